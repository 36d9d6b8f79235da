//! Integration tests on the real kernel, each on a machine (network namespace and cgroup) of its own. They need root.
#![forbid(unsafe_code)]

mod fixtures;
