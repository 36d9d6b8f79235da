//! Integration tests on the real kernel, each on a machine (netns and cgroup) of its own. They need
//! root.
#![forbid(unsafe_code)]

mod admission;
mod budget;
mod config_errors;
mod cookies;
mod counting;
mod doctor;
mod down;
mod exit;
mod explain;
mod fail_open;
mod failures;
mod fixtures;
mod floods;
mod health;
mod in_cluster;
mod keepalive;
mod kubernetes;
mod lifecycle;
mod load;
mod modes;
mod neighbours;
mod netns;
mod outlive;
mod pins;
mod place;
mod policies;
mod privileges;
mod queue;
mod reasons;
mod refusals;
mod servers;
mod sockets;
mod support;
mod unhealthy;
