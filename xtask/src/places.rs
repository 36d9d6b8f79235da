//! Where things are: the workspace and its target directory.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The workspace's root directory.
pub fn workspace() -> &'static Path {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest)
}

/// The target directory that this very program was built into: the one that cargo uses here,
/// however it was chosen.
///
/// # Errors
/// When the program was moved out of a target directory.
pub fn target() -> Result<PathBuf> {
    let program = std::env::current_exe().context("cannot tell where this program is")?;
    program
        .ancestors()
        .find(|directory| directory.join("CACHEDIR.TAG").is_file())
        .map(Path::to_path_buf)
        .with_context(|| {
            format!(
                "{} is not inside a cargo target directory: start it as `cargo xtask`",
                program.display()
            )
        })
}

/// Where this workspace's own tools are installed: apart from those that somebody uses for
/// something else.
///
/// # Errors
/// When the target directory can't be told.
pub fn tools() -> Result<PathBuf> {
    Ok(target()?.join("tools"))
}

/// Where tools are that somebody installed with cargo.
pub fn cargo_home() -> Option<PathBuf> {
    let chosen = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    chosen.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")))
}

/// The cargo that started this program, else the one in the path.
pub fn cargo() -> PathBuf {
    std::env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from)
}
