#![no_std]
//! What both sides of the kernel boundary share.
