//! What a guest boots into: busybox, the tests with what they need, and a few modules. Everything
//! is in memory there, and gone with it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use super::Kernel;
use super::debian::{self, Files};
use crate::build::{self, Profile};
use crate::{command, places};

/// What is a module in Debian's kernels: the socket table, and cables between network namespaces.
/// In the order in which they load.
const MODULES: [&str; 4] = ["inet_diag", "tcp_diag", "udp_diag", "veth"];
/// Programs that the tests start, of this machine.
const TOOLS: [&str; 2] = ["ip", "ss"];
/// Programs of ours that the tests start. Those that need a Kubernetes do not run there.
pub const PROGRAMS: [&str; 6] = [
    "balancer",
    "crowd",
    "kill-before",
    "kernel-half-cost",
    "hold-connections",
    "stranger",
];
/// Where busybox must not put a program of its own over one of this machine.
const REAL: &str = "usr/bin";

/// Makes the file for a kernel, and returns where it is.
///
/// # Errors
/// When something that belongs into it is missing, or there is no room.
pub fn make(kernel: &Kernel, files: &Files, test: &Path, arguments: &[String]) -> Result<PathBuf> {
    let directory = debian::cache()?.join("images");
    let root = directory.join(&kernel.name);
    if root.exists() {
        fs::remove_dir_all(&root).with_context(|| format!("cannot remove {}", root.display()))?;
    }
    let tree = Tree { root };
    tree.directories()?;
    tree.programs(test)?;
    tree.modules(files)?;
    tree.write("arguments", &arguments.join("\n"))?;
    if !kernel.supported {
        tree.write("unsupported", "")?;
    }
    let image = directory.join(format!("{}.cpio", kernel.name));
    pack(&tree.root, &image)?;
    fs::remove_dir_all(&tree.root).context("cannot remove what was packed")?;
    Ok(image)
}

/// The tree that is packed.
struct Tree {
    root: PathBuf,
}

impl Tree {
    fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        self.root.join(path)
    }

    fn directories(&self) -> Result<()> {
        let names = [
            "bin", "dev", "modules", "proc", "run", "sys", "tmp", "etc", REAL,
        ];
        for name in names {
            fs::create_dir_all(self.at(name)).context("cannot make the tree")?;
        }
        Ok(())
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        fs::write(self.at(name), text).with_context(|| format!("cannot write {name}"))
    }

    /// The layout of the target directory is kept: the tests look for programs beside themselves.
    fn programs(&self, test: &Path) -> Result<()> {
        let target = places::target()?;
        let vm = places::workspace().join("tests/kernel/vm");
        self.copy(&vm.join("init"), "init")?;
        self.copy(&vm.join("unsupported"), "bin/unsupported")?;
        self.copy(&tool("busybox")?, "bin/busybox")?;
        symlink("busybox", self.at("bin/sh")).context("cannot make bin/sh")?;
        let mut dynamic = vec![self.copy_stripped(test, "target/debug/deps/kernel")?];
        for program in PROGRAMS {
            let from = target.join("debug").join(program);
            dynamic.push(self.copy_stripped(&from, &format!("target/debug/{program}"))?);
        }
        for name in TOOLS {
            let path = format!("{REAL}/{name}");
            self.copy(&tool(name)?, &path)?;
            dynamic.push(self.at(path));
        }
        for profile in [Profile::Debug, Profile::Release] {
            let object = build::object(profile)?;
            let path = object.strip_prefix(&target).unwrap_or(&object);
            self.copy(&object, &format!("target/{}", path.display()))?;
        }
        self.libraries(&dynamic)
    }

    fn copy(&self, from: &Path, to: &str) -> Result<()> {
        let to = self.at(to);
        let parent = to.parent().unwrap_or(&self.root);
        fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
        fs::copy(from, &to)
            .map(drop)
            .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
    }

    /// Without what only a debugger reads, which is most of it.
    fn copy_stripped(&self, from: &Path, to: &str) -> Result<PathBuf> {
        let at = self.at(to);
        fs::create_dir_all(at.parent().unwrap_or(&self.root))?;
        let mut strip = Command::new("strip");
        command::run(strip.arg("--strip-debug").arg("-o").arg(&at).arg(from))?;
        Ok(at)
    }

    /// What the dynamic linker loads for these programs, where it looks for it.
    fn libraries(&self, programs: &[PathBuf]) -> Result<()> {
        let mut libraries = BTreeSet::new();
        for program in programs {
            let list = command::output(Command::new("ldd").arg(program)).with_context(|| {
                format!("cannot tell which libraries {} needs", program.display())
            })?;
            libraries.extend(paths_of(&list).map(PathBuf::from));
        }
        for library in libraries {
            let to = library.strip_prefix("/").unwrap_or(&library);
            self.copy(&library, &to.display().to_string())?;
        }
        Ok(())
    }

    /// Uncompressed, and numbered in the order in which they load.
    fn modules(&self, files: &Files) -> Result<()> {
        for (index, name) in MODULES.iter().enumerate() {
            let module = find(&files.modules, name)
                .with_context(|| format!("{} has no module {name}", files.modules.display()))?;
            let to = self.at(format!("modules/{index}-{name}.ko"));
            let unpacker = match module.extension().and_then(|extension| extension.to_str()) {
                Some("xz") => "xz",
                Some("zst") => "zstd",
                _ => {
                    fs::copy(&module, &to)?;
                    continue;
                }
            };
            let mut unpack = Command::new(unpacker);
            unpack.args(["--decompress", "--stdout"]).arg(&module);
            command::run(unpack.stdout(File::create(&to)?))?;
        }
        Ok(())
    }
}

/// The files in what `ldd` prints: `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)`,
/// `/lib64/ld-linux-x86-64.so.2 (0x…)`.
fn paths_of(list: &str) -> impl Iterator<Item = &str> {
    list.split_whitespace().filter(|word| word.starts_with('/'))
}

fn tool(name: &str) -> Result<PathBuf> {
    command::find(name).with_context(|| format!("`{name}` is missing: run `cargo xtask setup`"))
}

/// A module anywhere below a directory, whatever it is compressed with.
fn find(directory: &Path, module: &str) -> Option<PathBuf> {
    fs::read_dir(directory).ok()?.flatten().find_map(|entry| {
        let path = entry.path();
        if entry.file_type().ok()?.is_dir() {
            return find(&path, module);
        }
        let name = path.file_name()?.to_str()?;
        let is_it = name.strip_prefix(module)?.starts_with(".ko");
        is_it.then_some(path)
    })
}

/// Not compressed: an emulated processor takes longer to unpack it than this one to copy it.
fn pack(root: &Path, image: &Path) -> Result<()> {
    for program in ["init", "bin/unsupported"] {
        fs::set_permissions(root.join(program), fs::Permissions::from_mode(0o755))?;
    }
    let mut list = Command::new("find")
        .args([".", "-print0"])
        .current_dir(root)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start `find`")?;
    let names = list.stdout.take().context("`find` has no output")?;
    let mut cpio = Command::new(tool("cpio")?);
    cpio.args([
        "--create",
        "--format=newc",
        "--null",
        "--quiet",
        "--owner=0:0",
    ]);
    let written = command::run(
        cpio.current_dir(root)
            .stdin(names)
            .stdout(File::create(image)?),
    );
    ensure!(list.wait()?.success(), "`find` failed");
    written
}

#[cfg(test)]
mod tests {
    use super::paths_of;

    #[test]
    fn the_libraries_are_read_as_ldd_prints_them() {
        let list = "\tlinux-vdso.so.1 (0x00007ffe)\n\tlibm.so.6 => /lib/x/libm.so.6 (0x00007f)\n\t/lib64/ld.so.2 (0x00007f)\n";
        assert_eq!(
            paths_of(list).collect::<Vec<_>>(),
            ["/lib/x/libm.so.6", "/lib64/ld.so.2"]
        );
        assert_eq!(paths_of("\tnot a dynamic executable\n").count(), 0);
    }
}
