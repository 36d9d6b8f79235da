//! Embeds the kernel half that `cargo xtask build` made, or says what is missing.
//!
//! `$OUT_DIR/balancer.o` is always there afterwards, and empty when the kernel half has not been
//! built. The host half embeds it with `aya::include_bytes_aligned!(concat!(env!("OUT_DIR"),
//! "/balancer.o"))` and has to say so at run time where its length is 0.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use std::{env, fs};

fn main() -> Result<(), Box<dyn Error>> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let directory = kernel_half_directory(&out, &env::var("PROFILE")?)?;
    let object = directory.join("balancer.o");
    // Watching a file that is not there would build this crate anew each time; a directory shows
    // when the file comes.
    fs::create_dir_all(&directory)?;
    watch(&directory);
    if object.is_file() {
        warn_of_newer_sources(&object)?;
        fs::copy(&object, out.join("balancer.o"))?;
    } else {
        warn(
            "the kernel half is not built: this balancer can't run. `cargo xtask build` builds it and embeds it",
        );
        fs::write(out.join("balancer.o"), [])?;
    }
    Ok(())
}

/// `<target directory>/bpf/<profile>`. cargo marks its target directory, however deep `OUT_DIR` is
/// in it.
fn kernel_half_directory(out: &Path, profile: &str) -> Result<PathBuf, String> {
    let target = out
        .ancestors()
        .find(|directory| directory.join("CACHEDIR.TAG").is_file());
    let target = target
        .ok_or_else(|| format!("{} is not inside a cargo target directory", out.display()))?;
    Ok(target.join("bpf").join(profile))
}

/// cargo's list of the object's sources is beside it, in the form of a makefile.
fn warn_of_newer_sources(object: &Path) -> Result<(), Box<dyn Error>> {
    let rule = fs::read_to_string(object.with_extension("d"))?;
    let built = object.metadata()?.modified()?;
    for source in sources(&rule) {
        watch(&source);
        if modified(&source).is_none_or(|changed| changed > built) {
            warn(&format!(
                "the kernel half is older than {}: run `cargo xtask build`",
                source.display()
            ));
        }
    }
    Ok(())
}

/// `target: source source`, where a space inside a name follows a backslash.
fn sources(rule: &str) -> Vec<PathBuf> {
    let list = rule
        .lines()
        .next()
        .and_then(|line| line.split_once(": "))
        .map_or("", |(_, list)| list);
    let list = list.replace("\\ ", "\0");
    list.split_whitespace()
        .map(|name| PathBuf::from(name.replace('\0', " ")))
        .collect()
}

fn modified(path: &Path) -> Option<SystemTime> {
    path.metadata().ok()?.modified().ok()
}

fn watch(path: &Path) {
    println!("cargo::rerun-if-changed={}", path.display());
}

fn warn(message: &str) {
    println!("cargo::warning={message}");
}
