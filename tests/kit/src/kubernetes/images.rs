//! The container images of every test cluster, from programs of this machine.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use oci_archive::{Image, Layer, Root};

use crate::fixtures::{binary, process};

/// The image of every pod's first process.
pub const PAUSE: &str = "localhost/pause:1";
/// The image with a shell and its tools.
pub const BUSYBOX: &str = "localhost/busybox:1";
/// The image with a shell and this project's stand-in server, `/bin/standin-oap`.
pub const TOOLS: &str = "localhost/tools:1";

/// Writes an image of this name. Its layer is not compressed: it is unpacked on this machine right
/// away.
///
/// # Errors
/// When the archive can't be written.
pub fn write(name: &str, root: Root, entrypoint: &[&str], to: &Path) -> Result<()> {
    let image = Image {
        name: name.to_owned(),
        entrypoint: entrypoint.iter().map(ToString::to_string).collect(),
        created_by: "a test of the balancer".to_owned(),
        ..Image::default()
    };
    let file = File::create(to).with_context(|| format!("cannot make {}", to.display()))?;
    image.write(Layer::plain(root)?, file)
}

/// Writes [`PAUSE`]: nothing but a process that waits to be killed.
///
/// # Errors
/// When the machine has no busybox, or the archive can't be written.
pub fn write_pause(to: &Path) -> Result<()> {
    let mut root = Root::default();
    root.copy("bin/busybox", &busybox()?)?;
    // containerd kills the process; nobody waits until it heeds a TERM.
    write(PAUSE, root, &["/bin/busybox", "sleep", "2147483647"], to)
}

/// Writes [`BUSYBOX`].
///
/// # Errors
/// When the machine has no busybox, or the archive can't be written.
pub fn write_busybox(to: &Path) -> Result<()> {
    write(BUSYBOX, shell()?, &[], to)
}

/// Writes [`TOOLS`].
///
/// # Errors
/// When `cargo xtask test` did not build the stand-in, or the archive can't be written.
pub fn write_tools(to: &Path) -> Result<()> {
    let mut root = shell()?;
    root.program("bin/standin-oap", &binary().with_file_name("standin-oap"))?;
    write(TOOLS, root, &[], to)
}

/// A shell, and every tool of busybox.
///
/// # Errors
/// When the machine has no busybox.
pub fn shell() -> Result<Root> {
    let busybox = busybox()?;
    let mut root = Root::default();
    root.copy("bin/busybox", &busybox)?;
    for directory in ["etc", "proc", "sys", "dev", "run", "var", "root"] {
        root.directory(directory, 0o755);
    }
    root.directory("tmp", 0o1777);
    let output = process::output(Command::new(&busybox).arg("--list"));
    let tools = output.context("cannot start busybox")?.stdout;
    let tools = String::from_utf8_lossy(&tools);
    for tool in tools.lines().filter(|tool| *tool != "busybox") {
        root.link(&format!("bin/{tool}"), "busybox");
    }
    root.file("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\n");
    root.file("etc/group", 0o644, "root:x:0:\n");
    Ok(root)
}

/// The one of this machine, which needs no libraries.
fn busybox() -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|directory| directory.join("busybox"))
        .find(|busybox| busybox.is_file())
        .context("this machine has no busybox: `cargo xtask setup` installs one")
}
