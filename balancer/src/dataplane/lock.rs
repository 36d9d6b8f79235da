//! One writer at a time: a flock on the state directory, and a file that names its holder.

use std::fs::{self, File};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::{Uid, geteuid};
use tracing::{info, warn};

use super::notes::Note;
use super::paths::Paths;
use crate::discover::{ensure_bpffs, is_ending};
use crate::sys::privileges::user;

/// How long the lock of a process that ends is waited for. A process has the lock until its last
/// thread has left the kernel.
const ENDS_WITHIN: Duration = Duration::from_secs(2);

/// How often the lock is tried meanwhile.
const TRY_EVERY: Duration = Duration::from_millis(20);

/// The right to change a data plane; given back when dropped, also by the kernel when the process
/// dies.
#[derive(Debug)]
pub struct Lock {
    directory: Flock<File>,
    holder: Note,
    failed_reload: Note,
    /// Dropped last: what is empty goes once the lock is free.
    made: MadeDirectories,
}

/// Directories that a start has made, the innermost first. Those that are empty when this is
/// dropped are removed: a start that fails leaves none.
#[derive(Debug, Default)]
struct MadeDirectories(Vec<PathBuf>);

impl MadeDirectories {
    fn down_to(path: &Path) -> Result<Self> {
        let missing = path.ancestors().take_while(|path| !path.exists());
        let made = Self(missing.map(Path::to_owned).collect());
        make_directory(path)?;
        Ok(made)
    }
}

impl Drop for MadeDirectories {
    fn drop(&mut self) {
        for directory in &self.0 {
            // Best effort: one that is in use, or gone already, is not ours to remove.
            let _ = remove_empty(directory);
        }
    }
}

/// Removes a directory that holds nothing and that nobody has locked.
fn remove_empty(directory: &Path) -> Result<()> {
    let file = File::open(directory)?;
    let _locked = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno)?;
    Ok(fs::remove_dir(directory)?)
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
    /// Takes the lock for a daemon, making the state directory where it is missing.
    ///
    /// # Errors
    /// When another process has it, or the directory can't be made or is open to others.
    pub fn for_daemon(paths: &Paths) -> Result<Self> {
        if ensure_bpffs(paths.state_dir())? {
            info!("mounted the BPF file system");
        }
        let made = MadeDirectories::down_to(paths.state_dir())?;
        close_to_others(paths.state_dir()).with_context(|| {
            format!(
                "cannot use the state directory {}",
                paths.state_dir().display()
            )
        })?;
        match Self::take(paths)? {
            Held::Mine(mut lock) => {
                lock.made = made;
                // The file has just been read: what an earlier daemon said of it is over.
                lock.note_reload(None);
                Ok(lock)
            }
            Held::ByOther(pid) => bail!(
                "the data plane in {} already has a daemon: {} (a second one needs a --state-dir \
                 of its own)",
                paths.state_dir().display(),
                holder(pid)
            ),
        }
    }

    /// Takes the lock, and waits for it only where its holder ends, up to 2 s. The state directory
    /// must exist.
    ///
    /// # Errors
    /// When the directory can't be opened or locked, or the file that names the holder can't be
    /// written.
    pub fn take(paths: &Paths) -> Result<Held> {
        let deadline = Instant::now() + ENDS_WITHIN;
        loop {
            match Self::take_now(paths)? {
                Held::ByOther(Some(pid)) if is_ending(pid) && Instant::now() < deadline => {
                    sleep(TRY_EVERY);
                }
                held => return Ok(held),
            }
        }
    }

    /// Notes how reading the configuration file again went, for `status`: why it failed, or, with
    /// `None`, that it did not.
    pub fn note_reload(&self, error: Option<&str>) {
        let Some(error) = error else {
            return self.failed_reload.remove();
        };
        if let Err(error) = self.failed_reload.write_error(error) {
            warn!(
                "`status` can't show that the reload failed: cannot write {}: {error}",
                self.failed_reload.path().display()
            );
        }
    }

    /// Takes the lock of the state directory that is there now in place of the one that is locked,
    /// which somebody removed or unmounted.
    ///
    /// # Errors
    /// When the directory can't be opened or is open to others, or another process has its lock.
    pub fn follow(&mut self, paths: &Paths) -> Result<()> {
        if ensure_in_place(&self.directory, paths.state_dir()).is_ok() {
            return Ok(());
        }
        close_to_others(paths.state_dir())?;
        let directory = File::open(paths.state_dir())?;
        self.directory = Flock::lock(directory, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, errno)| errno)
            .context("another process holds the new state directory")?;
        Ok(())
    }

    fn take_now(paths: &Paths) -> Result<Held> {
        let directory = File::open(paths.state_dir()).with_context(|| {
            format!(
                "cannot open the state directory {}",
                paths.state_dir().display()
            )
        })?;
        let holder = Note::holder(paths);
        match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(locked) => {
                ensure_in_place(&locked, paths.state_dir())?;
                name_holder(&holder)?;
                Ok(Held::Mine(Self {
                    directory: locked,
                    holder,
                    failed_reload: Note::failed_reload(paths),
                    made: MadeDirectories::default(),
                }))
            }
            Err((_, Errno::EWOULDBLOCK)) => Ok(Held::ByOther(holder.pid())),
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
        // The directory is still locked here, so the notes can't be another's yet.
        self.holder.remove();
        self.failed_reload.remove();
    }
}

pub(super) fn make_directory(path: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("cannot make the directory {}", path.display()))
}

/// Why the daemon would refuse this state directory, and what to do about it: another user could
/// replace what is pinned there. One that is not there is made when the daemon starts.
pub fn refused(state_dir: &Path) -> Option<(String, String)> {
    refusal(state_dir, &fs::metadata(state_dir).ok()?)
}

/// A directory that was there already may be open to others.
fn close_to_others(state_dir: &Path) -> Result<()> {
    let directory = File::open(state_dir)?;
    let found = directory.metadata()?;
    if let Some((why, advice)) = refusal(state_dir, &found) {
        bail!("{why}: {advice}");
    }
    if found.mode() & 0o077 != 0 {
        directory.set_permissions(fs::Permissions::from_mode(0o700))?;
        info!("closed {} to other users", state_dir.display());
    }
    Ok(())
}

/// The sticky bit means that a directory is meant to be shared, as the root of a BPF file system
/// is.
fn refusal(state_dir: &Path, found: &fs::Metadata) -> Option<(String, String)> {
    if ![0, geteuid().as_raw()].contains(&found.uid()) {
        let owner = user(Uid::from_raw(found.uid()));
        let dir = state_dir.display();
        return Some((
            format!(
                "it belongs to {owner}, who could replace what is pinned there (an earlier \
                 `balancer run` as that user has left it, or somebody has made it)"
            ),
            format!(
                "see what is in it (ls -l {dir}), then remove it with `balancer unload --state-dir \
                 {dir}`, or give another --state-dir"
            ),
        ));
    }
    let mode = found.mode() & 0o7777;
    (mode & 0o1000 != 0 && mode & 0o077 != 0).then(|| {
        (
            format!("it is shared with others (mode {mode:o})"),
            "give one of its own below it".to_owned(),
        )
    })
}

/// How a message calls the process that has the lock.
pub(super) fn holder(pid: Option<u32>) -> String {
    pid.map_or_else(
        || "another process".to_owned(),
        |pid| format!("process {pid}"),
    )
}

/// Whoever had the lock may have removed the directory before giving it up: then it is the lock of
/// nothing.
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

fn name_holder(holder: &Note) -> Result<()> {
    let written = holder.write(&format!("{}\n", std::process::id()));
    written.with_context(|| {
        format!(
            "cannot write {}, which names the process that holds the lock",
            holder.path().display()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::bpffs::DetachedBpffs;
    use std::os::unix::fs::chown;
    use std::process::{Child, Command};
    use std::thread;

    /// A process that is named as the one that has the lock. Both go with it, also where a test
    /// panics.
    struct Holder {
        process: Child,
        note: Note,
    }

    impl Holder {
        fn of(paths: &Paths) -> Self {
            let process = Command::new("sleep").arg("30").spawn().expect("spawn");
            let note = Note::holder(paths);
            let holder = Self { process, note };
            let written = holder.note.write(&format!("{}\n", holder.process.id()));
            written.expect("written");
            holder
        }
    }

    impl Drop for Holder {
        fn drop(&mut self) {
            // Each fails only where that has been done already.
            let _ = self.process.kill();
            let _ = self.process.wait();
            self.note.remove();
        }
    }

    /// A state directory of its own that a file of this process has locked, as if a holder had.
    fn locked() -> (tempfile::TempDir, Paths, Flock<File>) {
        let directory = tempfile::tempdir().expect("a directory");
        let paths = Paths::new(directory.path());
        let file = File::open(directory.path()).expect("open");
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).expect("free");
        (directory, paths, lock)
    }

    #[test]
    fn a_holder_that_was_killed_is_waited_for() {
        let (_directory, paths, lock) = locked();
        let mut holder = Holder::of(&paths);
        holder.process.kill().expect("kill");
        let release = thread::spawn(move || {
            sleep(Duration::from_millis(200));
            drop(lock);
        });
        let held = Lock::take(&paths).expect("taken");
        assert!(matches!(held, Held::Mine(_)), "{held:?}");
        release.join().expect("no panic");
    }

    #[test]
    fn a_holder_that_lives_is_not_waited_for() {
        let (_directory, paths, _lock) = locked();
        let mut holder = Holder::of(&paths);
        let begin = Instant::now();
        let held = Lock::take(&paths).expect("tried");
        assert!(begin.elapsed() < ENDS_WITHIN, "{:?}", begin.elapsed());
        assert!(
            matches!(held, Held::ByOther(Some(pid)) if pid == holder.process.id()),
            "{held:?}"
        );
        holder.process.kill().expect("kill");
        holder.process.wait().expect("wait");
        let begin = Instant::now();
        let held = Lock::take(&paths).expect("tried");
        assert!(matches!(held, Held::ByOther(_)), "{held:?}");
        assert!(begin.elapsed() >= ENDS_WITHIN, "the wait is bounded");
    }

    #[test]
    fn a_start_that_comes_to_nothing_leaves_no_directory_that_it_made() {
        let bpffs = DetachedBpffs::new().expect("a BPF file system");
        let outer = bpffs.path().join("outer");
        let paths = Paths::new(&outer.join("state"));
        drop(Lock::for_daemon(&paths).expect("taken"));
        assert!(!outer.exists());

        fs::create_dir(&outer).expect("made");
        drop(Lock::for_daemon(&paths).expect("taken"));
        assert!(outer.exists(), "it was there before");

        let lock = Lock::for_daemon(&paths).expect("taken");
        let second = Lock::for_daemon(&paths).expect_err("one writer at a time");
        assert!(
            format!("{second:#}").contains("already has a daemon"),
            "{second:#}"
        );
        assert!(paths.state_dir().exists(), "it is another's");
        fs::create_dir(paths.current()).expect("made");
        drop(lock);
        assert!(paths.current().exists(), "what is in use stays");
    }

    #[test]
    fn a_directory_of_another_user_is_refused_with_its_owner_and_the_way_out() {
        let bpffs = DetachedBpffs::new().expect("a BPF file system");
        let paths = Paths::new(&bpffs.path().join("state"));
        fs::create_dir(paths.state_dir()).expect("made");
        chown(paths.state_dir(), Some(65_534), None).expect("root may");
        let error = Lock::for_daemon(&paths).expect_err("not ours");
        let said = format!("{error:#}");
        for words in [
            "user 65534 (nobody)",
            "earlier `balancer run`",
            "`balancer unload --state-dir ",
        ] {
            assert!(said.contains(words), "{said}");
        }
        assert!(paths.state_dir().exists());
    }
}
