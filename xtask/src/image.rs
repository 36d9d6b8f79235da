//! The image: an OCI archive that holds the balancer and the few libraries that it needs, made
//! without a container engine.
//!
//! Equal inputs give equal bytes: no times, no owners, everything sorted.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use oci_archive::{Image, Layer, Root};

use crate::build::{self, PRODUCT, Profile};
use crate::setup::{self, Need};
use crate::{command, machine, places};

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Where the balancer is in the image: in the `PATH`, so that `kubectl exec … -- balancer status`
/// finds it.
const PROGRAM: &str = "/usr/local/bin/balancer";
/// A node pulls it before its first connection is counted.
const MAX_BYTES: usize = 30_000_000;

/// Makes the image of [`make`], and says what it is.
///
/// # Errors
/// When [`make`] fails.
pub fn image(output: Option<PathBuf>, name: Option<&str>) -> Result<ExitCode> {
    make(output, name, Profile::Release)?;
    Ok(ExitCode::SUCCESS)
}

/// An image that was made.
pub struct Made {
    /// What it is called once it is loaded.
    pub name: String,
    /// The archive.
    pub archive: PathBuf,
    /// The balancer that is in it.
    pub program: PathBuf,
}

/// Builds the balancer and writes its image to `output`, by default below the target directory.
/// `name` is what the image is called once it is loaded; one without a tag gets the version.
///
/// # Errors
/// When the build fails, a library is missing, the optimised image is too large, or the balancer
/// does not run in it.
pub fn make(output: Option<PathBuf>, name: Option<&str>, profile: Profile) -> Result<Made> {
    let name = with_tag(name.unwrap_or("localhost/balancer"))?;
    setup::ensure(&[Need::Build])?;
    build::product(profile)?;
    let directory = places::target()?.join("image");
    std::fs::create_dir_all(&directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    let output = output.unwrap_or_else(|| directory.join(format!("balancer-{VERSION}.tar")));

    let program = directory.join("balancer");
    let built = places::target()?.join(profile.name()).join(PRODUCT);
    strip(&built, &program)?;
    let layer = Layer::compressed(root(&program)?)?;
    let tried = try_out(&layer, &directory.join("root"))?;
    let image = Image {
        name: name.clone(),
        entrypoint: vec![PROGRAM.to_owned()],
        annotations: annotations(revision()),
        created_by: "cargo xtask image".to_owned(),
    };
    let mut archive = Vec::new();
    image.write(layer, &mut archive)?;
    ensure!(
        archive.len() <= MAX_BYTES || profile == Profile::Debug,
        "the image has {} bytes, more than {MAX_BYTES}: what has grown is {}",
        archive.len(),
        program.display()
    );
    std::fs::write(&output, &archive)
        .with_context(|| format!("cannot write {}", output.display()))?;
    println!(
        "{}: {name}, {:.1} MB",
        output.display(),
        megabytes(archive.len())
    );
    println!("{tried}");
    Ok(Made {
        name,
        archive: output,
        program,
    })
}

#[expect(clippy::cast_precision_loss, reason = "one decimal is shown")]
fn megabytes(bytes: usize) -> f64 {
    bytes as f64 / 1e6
}

/// A reference with a tag.
fn with_tag(name: &str) -> Result<String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._/:-".contains(c);
    ensure!(
        name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(plain),
        "`{name}` is not an image's name: write it as registry.example/team/balancer:{VERSION}"
    );
    // A colon before the last slash is that of a registry's port.
    let has_tag = name
        .rsplit('/')
        .next()
        .is_some_and(|last| last.contains(':'));
    Ok(if has_tag {
        name.to_owned()
    } else {
        format!("{name}:{VERSION}")
    })
}

/// Copies a program without its debug information, of which there is four times as much as of
/// everything else. Symbols stay: backtraces name functions.
fn strip(program: &Path, stripped: &Path) -> Result<()> {
    let Some(strip) = command::find("strip") else {
        bail!("strip is missing: apt-get install binutils")
    };
    command::run(
        Command::new(strip)
            .arg("--strip-debug")
            .arg("-o")
            .args([stripped, program]),
    )
}

/// A root directory in which `program` runs, as [`PROGRAM`].
fn root(program: &Path) -> Result<Root> {
    let mut root = Root::default();
    root.program(PROGRAM, program)?;
    for licence in ["LICENSE-APACHE", "LICENSE-MIT", "LICENSE-GPL2"] {
        let path = format!("/usr/share/doc/balancer/{licence}");
        root.copy(&path, &places::workspace().join(licence))?;
    }
    Ok(root)
}

/// Runs the balancer with what is in the layer as its root directory: nothing else of this machine
/// is there to help it. Says how that went.
fn try_out(layer: &Layer, directory: &Path) -> Result<String> {
    if machine::effective_user() != Some(0) {
        return Ok("not tried: only root may run it in a root directory of its own".to_owned());
    }
    if directory.exists() {
        std::fs::remove_dir_all(directory)
            .with_context(|| format!("cannot remove {}", directory.display()))?;
    }
    layer.unpack(directory)?;
    let said = output_in(directory, &[PROGRAM, "--version"])?;
    std::fs::remove_dir_all(directory)
        .with_context(|| format!("cannot remove {}", directory.display()))?;
    ensure!(
        said.contains(VERSION),
        "the balancer in the image says `{said}`, not that it is version {VERSION}"
    );
    Ok(format!(
        "tried in a root directory of its own: {}",
        said.trim()
    ))
}

/// What a program prints that has `directory` as its root directory.
fn output_in(directory: &Path, program: &[&str]) -> Result<String> {
    let output = Command::new(command::find("chroot").context("chroot is missing: coreutils")?)
        .arg(directory)
        .args(program)
        .env_clear()
        .output()
        .context("cannot start chroot")?;
    ensure!(
        output.status.success(),
        "{} does not run in the image ({}): {}",
        program.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The commit, where nothing else went into the build.
fn revision() -> Option<String> {
    let git = |arguments: &[&str]| {
        let mut git = Command::new("git");
        git.current_dir(places::workspace()).args(arguments);
        command::output(&mut git)
    };
    git(&["status", "--porcelain"]).filter(String::is_empty)?;
    Some(git(&["rev-parse", "HEAD"])?.trim().to_owned())
}

/// The predefined annotation keys of the OCI image specification.
fn annotations(revision: Option<String>) -> BTreeMap<String, String> {
    let given = [
        ("title", "balancer"),
        (
            "description",
            "Connection balancer for Apache SkyWalking OAP and other servers with long-lived gRPC connections",
        ),
        ("version", VERSION),
        ("licenses", env!("CARGO_PKG_LICENSE")),
    ];
    let given = given
        .map(|(key, value)| (key, value.to_owned()))
        .into_iter();
    given
        .chain(revision.map(|revision| ("revision", revision)))
        .map(|(key, value)| (format!("org.opencontainers.image.{key}"), value))
        .collect()
}

#[cfg(test)]
mod tests {
    use oci_archive::{Layer, Root};

    use super::{PROGRAM, VERSION, output_in, with_tag};

    #[test]
    fn a_name_without_a_tag_gets_the_version() {
        let versioned = format!("registry.example:5000/team/balancer:{VERSION}");
        for (given, expected) in [
            ("registry.example:5000/team/balancer", versioned.as_str()),
            (
                "registry.example:5000/team/balancer:next",
                "registry.example:5000/team/balancer:next",
            ),
            ("balancer:1", "balancer:1"),
        ] {
            assert_eq!(with_tag(given).unwrap(), expected);
        }
        for wrong in ["", "a b", "/balancer", "balancer@sha256:00", "-x"] {
            assert!(with_tag(wrong).is_err(), "{wrong} was taken");
        }
    }

    /// `ls` needs several libraries and the loader. Needs root, for chroot.
    #[test]
    fn a_program_runs_with_the_libraries_that_are_found_for_it_alone() {
        let program = crate::command::find("ls").unwrap();
        let mut root = Root::default();
        root.program(PROGRAM, &program).unwrap();
        let directory = tempfile::tempdir().unwrap();
        Layer::compressed(root)
            .unwrap()
            .unpack(directory.path())
            .unwrap();
        let seen = output_in(directory.path(), &[PROGRAM, "/usr/local/bin"]).unwrap();
        assert_eq!(seen.trim(), "balancer");

        // And it would not without them: it is the image that is tried, not this machine.
        for libraries in ["lib", "lib64", "usr/lib", "usr/lib64"] {
            let _ = std::fs::remove_dir_all(directory.path().join(libraries));
        }
        output_in(directory.path(), &[PROGRAM, "/"]).unwrap_err();
    }
}
