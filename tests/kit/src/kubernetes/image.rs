//! Container images without a registry: archives in the OCI layout, of one layer, which containerd imports.
//!
//! The layer is not compressed: it is unpacked on the same machine right away.

use std::fs::{self, DirEntry, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

use crate::fixtures::{binary, process};

/// The image of every pod's first process.
pub const PAUSE: &str = "localhost/pause:1";
/// The image with a shell and its tools.
pub const BUSYBOX: &str = "localhost/busybox:1";
/// The image with a shell and this project's stand-in server, `/bin/standin-oap`.
pub const TOOLS: &str = "localhost/tools:1";

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// An image that is put together file by file.
pub struct Image {
    reference: String,
    entrypoint: Vec<String>,
    layer: Builder<Vec<u8>>,
}

impl Image {
    /// An empty one of this name: `localhost/web:1`.
    pub fn new(reference: &str) -> Self {
        Self {
            reference: reference.to_owned(),
            entrypoint: Vec::new(),
            layer: Builder::new(Vec::new()),
        }
    }

    /// Nothing but a process that waits to be killed.
    ///
    /// # Panics
    /// When the machine has no busybox.
    pub fn pause() -> Self {
        // containerd kills the process; nobody waits until it heeds a TERM.
        Self::new(PAUSE)
            .file("bin/busybox", &busybox())
            .entrypoint(&["/bin/busybox", "sleep", "2147483647"])
    }

    /// A shell, and every tool of busybox.
    ///
    /// # Panics
    /// When the machine has no busybox.
    #[must_use]
    pub fn shell(reference: &str) -> Self {
        let busybox = busybox();
        let mut image = Self::new(reference).file("bin/busybox", &busybox);
        for directory in ["etc", "proc", "sys", "dev", "run", "var", "root"] {
            image.entry(EntryType::Directory, directory, 0o755, b"");
        }
        image.entry(EntryType::Directory, "tmp", 0o1777, b"");
        let output = process::output(Command::new(&busybox).arg("--list"));
        let tools = output.expect("busybox can be started").stdout;
        let tools = String::from_utf8_lossy(&tools);
        for tool in tools.lines().filter(|tool| *tool != "busybox") {
            image.link(&format!("bin/{tool}"), "busybox");
        }
        image
            .text("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n")
            .text("etc/group", "root:x:0:\n")
    }

    /// [`TOOLS`].
    ///
    /// # Panics
    /// When `cargo xtask build` has not run.
    pub fn tools() -> Self {
        let program = binary().with_file_name("standin-oap");
        Self::shell(TOOLS).program("bin/standin-oap", &program)
    }

    /// Adds a file of this machine, executable if it is.
    ///
    /// # Panics
    /// When it can't be read.
    #[must_use]
    pub fn file(mut self, inside: &str, from: &Path) -> Self {
        use std::os::unix::fs::PermissionsExt as _;
        let read = fs::read(from).and_then(|bytes| Ok((bytes, from.metadata()?)));
        let (bytes, metadata) =
            read.unwrap_or_else(|error| panic!("cannot read {}: {error}", from.display()));
        let mode = metadata.permissions().mode() & 0o777;
        self.entry(EntryType::Regular, inside, mode, &bytes);
        self
    }

    /// Adds a file with this text.
    #[must_use]
    pub fn text(mut self, inside: &str, text: &str) -> Self {
        self.entry(EntryType::Regular, inside, 0o644, text.as_bytes());
        self
    }

    /// Adds the files of a directory of this machine, those in directories below too. A symbolic link becomes what it leads to.
    ///
    /// # Panics
    /// When something can't be read.
    #[must_use]
    pub fn directory(self, inside: &str, from: &Path) -> Self {
        let entries = fs::read_dir(from).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let mut entries =
            entries.unwrap_or_else(|error| panic!("cannot read {}: {error}", from.display()));
        entries.sort_by_key(DirEntry::file_name);
        entries.iter().fold(self, |image, entry| {
            let inside = format!("{inside}/{}", entry.file_name().to_string_lossy());
            if entry.path().is_dir() {
                image.directory(&inside, &entry.path())
            } else {
                image.file(&inside, &entry.path())
            }
        })
    }

    /// Adds a program of this machine, and the shared libraries that it is loaded with, where they are here.
    ///
    /// # Panics
    /// When it can't be read.
    #[must_use]
    pub fn program(self, inside: &str, from: &Path) -> Self {
        self.file(inside, from).libraries(from, |_| true)
    }

    /// Adds the shared libraries of this machine that a program, or a library, is loaded with, but for those in this directory.
    ///
    /// # Panics
    /// When one can't be read.
    #[must_use]
    pub fn libraries_outside(self, directory: &Path, of: &Path) -> Self {
        self.libraries(of, |library| !library.starts_with(directory))
    }

    fn libraries(self, of: &Path, wanted: impl Fn(&Path) -> bool) -> Self {
        let output = process::output(Command::new("ldd").arg(of));
        // It fails for a static program.
        let libraries = output.expect("`ldd` can be started").stdout;
        let libraries = String::from_utf8_lossy(&libraries).into_owned();
        let libraries = libraries
            .lines()
            .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
            .filter(|library| wanted(Path::new(library)));
        libraries.fold(self, |image, library| {
            image.file(library.trim_start_matches('/'), Path::new(library))
        })
    }

    /// What a container runs that is not told otherwise.
    #[must_use]
    pub fn entrypoint(mut self, words: &[&str]) -> Self {
        self.entrypoint = words.iter().map(ToString::to_string).collect();
        self
    }

    /// Writes the archive.
    ///
    /// # Panics
    /// When the file can't be written.
    #[track_caller]
    pub fn write(self, to: &Path) {
        let layer = self.layer.into_inner().expect("memory can be written");
        let layer = Blob::new(LAYER, layer);
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let config = Blob::json(
            CONFIG,
            &json!({
                "architecture": architecture,
                "os": "linux",
                "config": {
                    "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
                    "Entrypoint": self.entrypoint,
                },
                // The digest of the layer as it is when unpacked: it is not packed.
                "rootfs": {"type": "layers", "diff_ids": [layer.digest()]},
            }),
        );
        let manifest = Blob::json(
            MANIFEST,
            &json!({
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": config.descriptor(),
                "layers": [layer.descriptor()],
            }),
        );
        let mut named = manifest.descriptor();
        named["annotations"] = json!({"io.containerd.image.name": self.reference});
        named["platform"] = json!({"architecture": architecture, "os": "linux"});
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [named]});
        let file = File::create(to)
            .unwrap_or_else(|error| panic!("cannot make {}: {error}", to.display()));
        let mut archive = Builder::new(file);
        append(
            &mut archive,
            EntryType::Regular,
            "oci-layout",
            0o644,
            br#"{"imageLayoutVersion":"1.0.0"}"#,
        );
        let index = index.to_string();
        append(
            &mut archive,
            EntryType::Regular,
            "index.json",
            0o644,
            index.as_bytes(),
        );
        for blob in [layer, config, manifest] {
            let path = format!("blobs/sha256/{}", blob.sha256);
            append(&mut archive, EntryType::Regular, &path, 0o644, &blob.bytes);
        }
        archive.finish().expect("the archive can be written");
    }

    fn entry(&mut self, kind: EntryType, inside: &str, mode: u32, bytes: &[u8]) {
        append(&mut self.layer, kind, inside, mode, bytes);
    }

    fn link(&mut self, inside: &str, to: &str) {
        let mut header = header(EntryType::Symlink, 0o777, 0);
        let added = self.layer.append_link(&mut header, inside, to);
        added.expect("memory can be written");
    }
}

/// A part of an image, named by its hash.
struct Blob {
    media_type: &'static str,
    bytes: Vec<u8>,
    sha256: String,
}

impl Blob {
    fn new(media_type: &'static str, bytes: Vec<u8>) -> Self {
        use std::fmt::Write as _;
        let mut sha256 = String::new();
        for byte in Sha256::digest(&bytes) {
            write!(sha256, "{byte:02x}").expect("a string can be written");
        }
        Self {
            media_type,
            bytes,
            sha256,
        }
    }

    fn json(media_type: &'static str, value: &Value) -> Self {
        Self::new(media_type, value.to_string().into_bytes())
    }

    fn digest(&self) -> String {
        format!("sha256:{}", self.sha256)
    }

    fn descriptor(&self) -> Value {
        json!({"mediaType": self.media_type, "digest": self.digest(), "size": self.bytes.len()})
    }
}

fn append<W: std::io::Write>(
    archive: &mut Builder<W>,
    kind: EntryType,
    path: &str,
    mode: u32,
    bytes: &[u8],
) {
    let mut header = header(kind, mode, bytes.len());
    let added = archive.append_data(&mut header, path, bytes);
    added.expect("the archive can be written");
}

fn header(kind: EntryType, mode: u32, size: usize) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size.try_into().expect("a size"));
    header
}

/// The one of this machine, which needs no libraries.
fn busybox() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|directory| directory.join("busybox"))
        .find(|busybox| busybox.is_file())
        .expect("this machine has a busybox: `cargo xtask setup`")
}
