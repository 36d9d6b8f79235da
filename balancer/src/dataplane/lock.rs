//! One writer at a time: a flock on the state directory, and a file that names its holder.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::Paths;

const HOLDERS: &str = "/run/balancer";

/// The right to change a data plane; given back when dropped, also by the kernel when the process dies.
#[derive(Debug)]
pub struct Lock {
    _directory: Flock<File>,
    holder: PathBuf,
}

/// How taking the lock ended.
#[derive(Debug)]
pub enum Held {
    /// It is ours.
    Mine(Lock),
    /// Another process has it: its id, if it could be found out.
    ByOther(Option<u32>),
}

impl Lock {
    /// Takes the lock without waiting. The state directory must exist.
    ///
    /// # Errors
    /// When the directory can't be opened or locked, or the file that names the holder can't be written.
    pub fn take(paths: &Paths) -> Result<Held> {
        let directory = File::open(paths.state_dir()).with_context(|| {
            format!(
                "cannot open the state directory {}",
                paths.state_dir().display()
            )
        })?;
        let holder = holder_file(paths.state_dir());
        match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(locked) => {
                ensure_in_place(&locked, paths.state_dir())?;
                name_holder(&holder)?;
                Ok(Held::Mine(Self {
                    _directory: locked,
                    holder,
                }))
            }
            Err((_, Errno::EWOULDBLOCK)) => Ok(Held::ByOther(holder_of(&holder))),
            Err((_, errno)) => Err(errno).with_context(|| {
                format!(
                    "cannot lock the state directory {}",
                    paths.state_dir().display()
                )
            }),
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // The directory is still locked here, so the file can't be another's yet.
        let _ = fs::remove_file(&self.holder);
    }
}

/// Whoever had the lock may have removed the directory before giving it up: then it is the lock of nothing.
fn ensure_in_place(locked: &File, state_dir: &Path) -> Result<()> {
    let inode = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let in_place = fs::metadata(state_dir).map(inode).ok() == locked.metadata().map(inode).ok();
    ensure!(
        in_place,
        "the state directory {} was removed by another process at this very moment: try again",
        state_dir.display()
    );
    Ok(())
}

fn holder_file(state_dir: &Path) -> PathBuf {
    let name: String = state_dir
        .to_string_lossy()
        .trim_matches('/')
        .replace('/', "-");
    Path::new(HOLDERS).join(format!("{name}.pid"))
}

fn name_holder(file: &Path) -> Result<()> {
    let write = || {
        fs::create_dir_all(HOLDERS)?;
        fs::write(file, format!("{}\n", std::process::id()))
    };
    write().with_context(|| {
        format!(
            "cannot write {}, which names the process that holds the lock",
            file.display()
        )
    })
}

fn holder_of(file: &Path) -> Option<u32> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}
