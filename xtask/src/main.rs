//! `cargo xtask`: the verbs of development.
fn main() {}
