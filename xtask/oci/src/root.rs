//! The root directory of an image.

use std::collections::BTreeMap;
use std::fs::{self, DirEntry};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

/// The files of an image, by their path without the leading slash: a directory comes before what is
/// in it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Root(pub(crate) BTreeMap<String, Entry>);

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    Directory { mode: u32 },
    File { mode: u32, content: Vec<u8> },
    Link { to: String },
}

impl Root {
    /// Adds an empty directory.
    pub fn directory(&mut self, path: &str, mode: u32) {
        self.add(path, Entry::Directory { mode });
    }

    /// Adds a file with this content.
    pub fn file(&mut self, path: &str, mode: u32, content: impl Into<Vec<u8>>) {
        let content = content.into();
        self.add(path, Entry::File { mode, content });
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, to: &str) {
        self.add(path, Entry::Link { to: to.to_owned() });
    }

    /// Adds a file of this machine, executable if it is so for its owner. Of a symbolic link, what
    /// it leads to. The other permissions depend on the umask of whoever made the file: everybody
    /// may read it in the image.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn copy(&mut self, path: &str, from: &Path) -> Result<()> {
        let read = fs::read(from).and_then(|content| Ok((content, from.metadata()?)));
        let (content, metadata) =
            read.with_context(|| format!("cannot read {}", from.display()))?;
        let is_executable = metadata.permissions().mode() & 0o100 != 0;
        self.file(path, if is_executable { 0o755 } else { 0o644 }, content);
        Ok(())
    }

    /// Adds the files of a directory of this machine, and of the directories below it.
    ///
    /// # Errors
    /// When something can't be read.
    pub fn copy_tree(&mut self, path: &str, from: &Path) -> Result<()> {
        let entries = fs::read_dir(from).and_then(Iterator::collect::<Result<Vec<DirEntry>, _>>);
        for entry in entries.with_context(|| format!("cannot list {}", from.display()))? {
            let path = format!("{path}/{}", entry.file_name().to_string_lossy());
            if entry.path().is_dir() {
                self.copy_tree(&path, &entry.path())?;
            } else {
                self.copy(&path, &entry.path())?;
            }
        }
        Ok(())
    }

    /// Adds a program of this machine, and the shared libraries that it is loaded with, where the
    /// loader finds them here.
    ///
    /// # Errors
    /// When something can't be read, or a library is missing on this machine.
    pub fn program(&mut self, path: &str, from: &Path) -> Result<()> {
        let libraries = Libraries::of(from)?;
        ensure!(
            libraries.missing.is_empty(),
            "{} needs {}: install the packages that have them",
            from.display(),
            libraries.missing.join(", ")
        );
        self.copy(path, from)?;
        libraries
            .found
            .iter()
            .try_for_each(|file| self.copy_at(file))
    }

    /// Adds the shared libraries that a file of a directory is loaded with, but for those in that
    /// directory.
    ///
    /// # Errors
    /// When something can't be read.
    pub fn libraries_outside(&mut self, directory: &Path, of: &Path) -> Result<()> {
        let libraries = Libraries::of(of)?.found.into_iter();
        let mut outside = libraries.filter(|library| !library.starts_with(directory));
        outside.try_for_each(|file| self.copy_at(&file))
    }

    /// Adds a file at the path that it has here.
    fn copy_at(&mut self, file: &Path) -> Result<()> {
        let path = file.to_str().context("a path is not UTF-8")?;
        self.copy(path, file)
    }

    fn add(&mut self, path: &str, entry: Entry) {
        let path = path.trim_start_matches('/');
        for (end, _) in path.match_indices('/') {
            let parent = Entry::Directory { mode: 0o755 };
            self.0.entry(path[..end].to_owned()).or_insert(parent);
        }
        self.0.insert(path.to_owned(), entry);
    }
}

/// The shared libraries of a program, its loader among them.
#[derive(Debug, Default, PartialEq, Eq)]
struct Libraries {
    found: Vec<PathBuf>,
    missing: Vec<String>,
}

impl Libraries {
    fn of(program: &Path) -> Result<Self> {
        let output = Command::new("ldd")
            .arg(program)
            // Cargo sets it: what is found with it is not where the loader looks in the image.
            .env_remove("LD_LIBRARY_PATH")
            .env("LC_ALL", "C")
            .output()
            .context("cannot start ldd, which finds shared libraries")?;
        if !output.status.success() {
            let complaint = String::from_utf8_lossy(&output.stderr);
            if complaint.contains("not a dynamic executable") {
                return Ok(Self::default());
            }
            bail!("ldd {} failed: {complaint}", program.display());
        }
        Ok(Self::parse(&String::from_utf8_lossy(&output.stdout)))
    }

    /// From lines such as `libc.so.6 => /lib/…/libc.so.6 (0x…)`, `/lib64/ld-linux-x86-64.so.2
    /// (0x…)`, and `linux-vdso.so.1 (0x…)`, which is no file.
    fn parse(text: &str) -> Self {
        let mut libraries = Self::default();
        for line in text.lines().map(str::trim) {
            let (name, found) = line.split_once(" => ").unwrap_or((line, line));
            let path = found.split(" (").next().unwrap_or(found);
            if path.starts_with('/') {
                libraries.found.push(PathBuf::from(path));
            } else if found.starts_with("not found") {
                libraries.missing.push(name.to_owned());
            }
        }
        libraries.found.sort();
        libraries.found.dedup();
        libraries
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::PathBuf;

    use super::{Entry, Libraries, Root};

    #[test]
    fn libraries_are_what_ldd_names_with_a_path() {
        let text = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibgcc_s.so.1 => /lib/libgcc_s.so.1 (0x00007f)\n\
                    \tlibc.so.6 => /lib/libc.so.6 (0x00007f)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n\
                    \tlibx.so.1 => not found\n";
        let expected = [
            "/lib/libc.so.6",
            "/lib/libgcc_s.so.1",
            "/lib64/ld-linux-x86-64.so.2",
        ];
        let libraries = Libraries::parse(text);
        assert_eq!(libraries.found, expected.map(PathBuf::from));
        assert_eq!(libraries.missing, ["libx.so.1"]);
        let none = Libraries::parse("\tstatically linked\n");
        assert_eq!(none, Libraries::default());
    }

    #[test]
    fn a_root_has_every_directory_before_what_is_in_it() {
        let mut root = Root::default();
        root.directory("tmp", 0o1777);
        root.file("/usr/share/doc/x", 0o644, "x");
        root.file("bin/y", 0o755, "y");
        root.file("tmp/z", 0o644, "z");
        let paths: Vec<_> = root.0.keys().map(String::as_str).collect();
        assert_eq!(
            paths,
            [
                "bin",
                "bin/y",
                "tmp",
                "tmp/z",
                "usr",
                "usr/share",
                "usr/share/doc",
                "usr/share/doc/x"
            ]
        );
        assert_eq!(root.0["usr"], Entry::Directory { mode: 0o755 });
        assert_eq!(root.0["tmp"], Entry::Directory { mode: 0o1777 });
    }

    #[test]
    fn a_umask_does_not_show_in_the_image() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("x");
        fs::write(&file, "x").unwrap();
        for (here, expected) in [(0o600, 0o644), (0o664, 0o644), (0o700, 0o755)] {
            fs::set_permissions(&file, Permissions::from_mode(here)).unwrap();
            let mut root = Root::default();
            root.copy("x", &file).unwrap();
            let content = b"x".to_vec();
            let mode = expected;
            assert_eq!(root.0["x"], Entry::File { mode, content }, "{here:o}");
        }
    }
}
