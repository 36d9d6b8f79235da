//! The image: an OCI archive that holds the balancer and the few libraries that it needs, made without a container engine.
//!
//! The same inputs give the same bytes: no times, no owners, everything sorted.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use flate2::{Compression, GzBuilder, read::GzDecoder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::build::{self, Profile};
use crate::setup::{self, Need};
use crate::{command, machine, places};

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Where the balancer is in the image: in the `PATH`, so that `kubectl exec … -- balancer status` finds it.
const PROGRAM: &str = "/usr/local/bin/balancer";
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// A node pulls it before its first connection is counted.
const MAX_BYTES: usize = 30_000_000;

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// Makes the image of [`make`], and says what it is.
///
/// # Errors
/// Those of [`make`].
pub fn image(output: Option<PathBuf>, name: Option<&str>) -> Result<ExitCode> {
    make(output, name)?;
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

/// Builds the balancer, optimised, and writes its image to `output`, by default below the target directory. `name` is what the image is
/// called once it is loaded; one without a tag gets the version.
///
/// # Errors
/// When the build fails, a library is missing, the image is too large, or the balancer does not run in it.
pub fn make(output: Option<PathBuf>, name: Option<&str>) -> Result<Made> {
    let name = with_tag(name.unwrap_or("localhost/balancer"))?;
    setup::ensure(&[Need::Build])?;
    build::product(Profile::Release)?;
    let directory = places::target()?.join("image");
    std::fs::create_dir_all(&directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    let output = output.unwrap_or_else(|| directory.join(format!("balancer-{VERSION}.tar")));

    let program = directory.join("balancer");
    strip(&places::target()?.join("release/balancer"), &program)?;
    let layer = Layer::new(&root(&program)?)?;
    let tried = try_out(&layer, &directory.join("root"))?;
    let archive = archive(&layer, &name, revision().as_deref())?;
    ensure!(
        archive.len() <= MAX_BYTES,
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

/// Copies a program without its debug information, of which there is four times as much as of everything else. Symbols stay: backtraces name
/// functions.
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

/// What an image is made of: by path without the leading slash, so that a directory comes before what is in it.
type Root = BTreeMap<String, Entry>;

#[derive(Debug, PartialEq, Eq)]
enum Entry {
    Directory,
    File { mode: u32, content: Vec<u8> },
}

/// A root directory in which `program` runs, as [`PROGRAM`].
fn root(program: &Path) -> Result<Root> {
    let mut root = Root::new();
    add(&mut root, Path::new(PROGRAM), program, 0o755)?;
    for library in libraries(program)? {
        add(&mut root, &library, &library, 0o755)?;
    }
    for licence in ["LICENSE-APACHE", "LICENSE-MIT", "LICENSE-GPL2"] {
        let place = Path::new("/usr/share/doc/balancer").join(licence);
        add(&mut root, &place, &places::workspace().join(licence), 0o644)?;
    }
    Ok(root)
}

/// Adds the file `from` at `place`, and the directories that it is in.
fn add(root: &mut Root, place: &Path, from: &Path, mode: u32) -> Result<()> {
    let place = place
        .to_str()
        .and_then(|place| place.strip_prefix('/'))
        .with_context(|| format!("{} is not a place in an image", place.display()))?;
    for (end, _) in place.match_indices('/') {
        root.insert(place[..end].to_owned(), Entry::Directory);
    }
    // Follows links: the libraries' names are links to files with a version.
    let content = std::fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    root.insert(place.to_owned(), Entry::File { mode, content });
    Ok(())
}

/// The shared libraries of a program and the loader, where the loader looks for them here.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd")
        .arg(program)
        // Cargo sets it for this process: what is found with it is not where the loader looks in the image.
        .env_remove("LD_LIBRARY_PATH")
        .env("LC_ALL", "C")
        .output()
        .context("cannot start ldd, which finds the libraries of the balancer")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        if complaint.contains("not a dynamic executable") {
            return Ok(Vec::new());
        }
        bail!("ldd {} failed: {complaint}", program.display());
    }
    parse_libraries(&text).with_context(|| format!("ldd {}", program.display()))
}

/// From lines such as `libc.so.6 => /lib/…/libc.so.6 (0x…)`, `/lib64/ld-linux-x86-64.so.2 (0x…)`, and `linux-vdso.so.1 (0x…)`, which is no file.
fn parse_libraries(text: &str) -> Result<Vec<PathBuf>> {
    let mut libraries = Vec::new();
    for line in text.lines().map(str::trim) {
        let found = line.split_once(" => ").map_or(line, |(_, found)| found);
        if found.starts_with("not found") {
            bail!("{line}: install the package that has it");
        }
        let path = found.split(" (").next().unwrap_or(found);
        if path.starts_with('/') {
            libraries.push(PathBuf::from(path));
        }
    }
    libraries.sort();
    libraries.dedup();
    Ok(libraries)
}

/// A root directory as images carry it.
struct Layer {
    /// Of the tar file before it is compressed: what makes up an image's identity.
    diff_id: String,
    compressed: Vec<u8>,
}

impl Layer {
    fn new(root: &Root) -> Result<Self> {
        let mut tar = tar::Builder::new(Vec::new());
        for (place, entry) in root {
            match entry {
                Entry::Directory => append(&mut tar, place, tar::EntryType::Directory, 0o755, &[])?,
                Entry::File { mode, content } => {
                    append(&mut tar, place, tar::EntryType::Regular, *mode, content)?;
                }
            }
        }
        let plain = tar.into_inner().context("cannot write the layer")?;
        Ok(Self {
            diff_id: digest(&plain),
            compressed: compress(&plain)?,
        })
    }

    fn unpack(&self, directory: &Path) -> Result<()> {
        tar::Archive::new(GzDecoder::new(&*self.compressed))
            .unpack(directory)
            .with_context(|| format!("cannot unpack the layer to {}", directory.display()))
    }
}

fn append(
    tar: &mut tar::Builder<Vec<u8>>,
    place: &str,
    kind: tar::EntryType,
    mode: u32,
    content: &[u8],
) -> Result<()> {
    // All zero but for what is set: owner root, and no time.
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(content.len() as u64);
    tar.append_data(&mut header, place, content)
        .with_context(|| format!("cannot put {place} into the image"))
}

fn compress(plain: &[u8]) -> Result<Vec<u8>> {
    let mut gzip = GzBuilder::new()
        .mtime(0)
        .write(Vec::new(), Compression::best());
    std::io::Write::write_all(&mut gzip, plain)
        .and_then(|()| gzip.finish())
        .context("cannot compress the layer")
}

/// Runs the balancer with what is in the layer as its root directory: nothing else of this machine is there to help it. Says how that went.
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

/// An OCI image layout in a tar file, with one image of one layer. It has the `manifest.json` of `docker save` too, which older engines look for.
fn archive(layer: &Layer, name: &str, revision: Option<&str>) -> Result<Vec<u8>> {
    let platform = json!({"architecture": architecture()?, "os": "linux"});
    let annotations = annotations(revision);
    let mut blobs = Blobs::default();
    let layer_blob = blobs.add(LAYER, layer.compressed.clone());
    let config = blobs.add_json(
        CONFIG,
        &json!({
            "architecture": platform["architecture"],
            "os": platform["os"],
            "created": "1970-01-01T00:00:00Z",
            "config": {"Entrypoint": [PROGRAM], "Env": [PATH], "WorkingDir": "/", "Labels": annotations},
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id]},
            "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "cargo xtask image"}],
        }),
    );
    let mut manifest = blobs.add_json(
        MANIFEST,
        &json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config,
            "layers": [layer_blob],
            "annotations": annotations,
        }),
    );
    let tag = name.rsplit(':').next().unwrap_or(VERSION);
    manifest["platform"] = platform;
    manifest["annotations"] =
        json!({"io.containerd.image.name": name, "org.opencontainers.image.ref.name": tag});
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [manifest]});
    let for_docker = json!([{
        "Config": place(&config),
        "RepoTags": [name],
        "Layers": [place(&layer_blob)],
    }]);

    let mut tar = tar::Builder::new(Vec::new());
    let mut file = |place: &str, content: &[u8]| {
        append(&mut tar, place, tar::EntryType::Regular, 0o644, content)
    };
    file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    file("index.json", index.to_string().as_bytes())?;
    file("manifest.json", for_docker.to_string().as_bytes())?;
    for (place, blob) in &blobs.0 {
        file(place, blob)?;
    }
    tar.into_inner().context("cannot write the image")
}

/// The predefined annotation keys of the OCI image specification.
fn annotations(revision: Option<&str>) -> Value {
    let mut annotations = json!({
        "org.opencontainers.image.title": "balancer",
        "org.opencontainers.image.description":
            "Connection balancer for Apache SkyWalking OAP and other servers with long-lived gRPC connections",
        "org.opencontainers.image.version": VERSION,
        "org.opencontainers.image.licenses": env!("CARGO_PKG_LICENSE"),
    });
    if let Some(revision) = revision {
        annotations["org.opencontainers.image.revision"] = json!(revision);
    }
    annotations
}

/// By place in the archive.
#[derive(Default)]
struct Blobs(BTreeMap<String, Vec<u8>>);

impl Blobs {
    /// Adds a blob and returns its descriptor.
    fn add(&mut self, media_type: &str, content: Vec<u8>) -> Value {
        let descriptor =
            json!({"mediaType": media_type, "digest": digest(&content), "size": content.len()});
        self.0.insert(place(&descriptor), content);
        descriptor
    }

    fn add_json(&mut self, media_type: &str, content: &Value) -> Value {
        self.add(media_type, content.to_string().into_bytes())
    }
}

/// Where the blob of a descriptor is.
fn place(descriptor: &Value) -> String {
    let digest = descriptor["digest"].as_str().unwrap_or_default();
    format!("blobs/{}", digest.replace(':', "/"))
}

fn digest(content: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(content)))
}

/// Bytes in hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    let digit = |value: u8| char::from_digit(u32::from(value), 16).unwrap_or('?');
    let digits = |byte: &u8| [digit(byte >> 4), digit(byte & 0xf)];
    bytes.iter().flat_map(digits).collect()
}

/// This machine's architecture by the name that Go, and so OCI, has for it.
fn architecture() -> Result<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        "riscv64" => Ok("riscv64"),
        other => bail!("no image for {other}: it has not been tried there"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Read;
    use std::path::{Path, PathBuf};

    use serde_json::Value;

    use super::{
        Entry, Layer, PROGRAM, Root, VERSION, add, archive, digest, libraries, output_in,
        parse_libraries, with_tag,
    };

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

    #[test]
    fn libraries_are_what_ldd_names_with_a_path() {
        let text = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibgcc_s.so.1 => /lib/libgcc_s.so.1 (0x00007f)\n\
                    \tlibc.so.6 => /lib/libc.so.6 (0x00007f)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let expected = [
            "/lib/libc.so.6",
            "/lib/libgcc_s.so.1",
            "/lib64/ld-linux-x86-64.so.2",
        ];
        assert_eq!(parse_libraries(text).unwrap(), expected.map(PathBuf::from));
        assert!(parse_libraries("\tstatically linked\n").unwrap().is_empty());
        let missing = parse_libraries("\tlibx.so.1 => not found\n").unwrap_err();
        assert!(missing.to_string().contains("libx.so.1"), "{missing}");
    }

    fn small_root() -> Root {
        let mut root = Root::new();
        let licence = crate::places::workspace().join("LICENSE-MIT");
        add(&mut root, Path::new("/usr/share/doc/x"), &licence, 0o644).unwrap();
        add(&mut root, Path::new("/bin/y"), &licence, 0o755).unwrap();
        root
    }

    #[test]
    fn a_root_has_every_directory_before_what_is_in_it() {
        let root = small_root();
        let places: Vec<_> = root.keys().map(String::as_str).collect();
        assert_eq!(
            places,
            [
                "bin",
                "bin/y",
                "usr",
                "usr/share",
                "usr/share/doc",
                "usr/share/doc/x"
            ]
        );
        assert_eq!(root["usr"], Entry::Directory);
    }

    #[test]
    fn the_same_files_give_the_same_archive() {
        let make = || archive(&Layer::new(&small_root()).unwrap(), "localhost/x:1", None).unwrap();
        assert!(make() == make(), "two archives of the same files differ");
    }

    #[test]
    fn everything_in_an_archive_is_found_by_its_digest() {
        let layer = Layer::new(&small_root()).unwrap();
        let files = files(&archive(&layer, "localhost/x:1", Some("c0ffee")).unwrap());
        let blob = |descriptor: &Value| {
            let named = descriptor["digest"].as_str().unwrap();
            let content = &files[&format!("blobs/{}", named.replace(':', "/"))];
            assert_eq!(digest(content), named);
            assert_eq!(descriptor["size"], content.len());
            content.clone()
        };
        let json = |content: &[u8]| serde_json::from_slice::<Value>(content).unwrap();

        let index = json(&files["index.json"]);
        let manifest = json(&blob(&index["manifests"][0]));
        let config = json(&blob(&manifest["config"]));
        let mut plain = Vec::new();
        flate2::read::GzDecoder::new(&*blob(&manifest["layers"][0]))
            .read_to_end(&mut plain)
            .unwrap();
        assert_eq!(config["rootfs"]["diff_ids"][0], digest(&plain));
        assert_eq!(config["config"]["Entrypoint"][0], PROGRAM);
        assert_eq!(
            manifest["annotations"]["org.opencontainers.image.revision"],
            "c0ffee"
        );
        let named = &index["manifests"][0]["annotations"];
        assert_eq!(named["io.containerd.image.name"], "localhost/x:1");
        assert_eq!(named["org.opencontainers.image.ref.name"], "1");

        let docker = json(&files["manifest.json"]);
        for place in [&docker[0]["Config"], &docker[0]["Layers"][0]] {
            assert!(
                files.contains_key(place.as_str().unwrap()),
                "{place} is missing"
            );
        }
    }

    fn files(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut archive = tar::Archive::new(archive);
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            assert_eq!(entry.header().mtime().unwrap(), 0);
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            (entry.path().unwrap().display().to_string(), content)
        });
        entries.collect()
    }

    /// `ls` needs several libraries and the loader. Needs root, for chroot.
    #[test]
    fn a_program_runs_with_the_libraries_that_are_found_for_it_alone() {
        let program = crate::command::find("ls").unwrap();
        let mut root = Root::new();
        add(&mut root, Path::new(PROGRAM), &program, 0o755).unwrap();
        let libraries = libraries(&program).unwrap();
        assert!(libraries.len() > 1, "{libraries:?}");
        for library in &libraries {
            add(&mut root, library, library, 0o755).unwrap();
        }
        let directory = tempfile::tempdir().unwrap();
        Layer::new(&root).unwrap().unpack(directory.path()).unwrap();
        let seen = output_in(directory.path(), &[PROGRAM, "/usr/local/bin"]).unwrap();
        assert_eq!(seen.trim(), "balancer");

        // And it would not without them: it is the image that is tried, not this machine.
        let loader = directory
            .path()
            .join(libraries.last().unwrap().strip_prefix("/").unwrap());
        std::fs::remove_file(loader).unwrap();
        output_in(directory.path(), &[PROGRAM, "/"]).unwrap_err();
    }
}
