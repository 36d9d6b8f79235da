//! What tests on the running kernel need: guards over kernel objects, the daemon under test, TCP
//! tools, a real Kubernetes, and reports of what was seen.
#![forbid(unsafe_code)]

pub mod cost;
pub mod docs;
pub mod fixtures;
pub mod kubernetes;
pub mod scenario;
