//! What a daemon notes in `/run/balancer` for whoever looks: a BPF file system takes nothing but
//! pins.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::paths::Paths;
use super::place_notes::PlacingNotes;
use super::read::snapshot::DaemonSnapshot;
use crate::discover::is_ending;
use crate::sys::clock;

const DIRECTORY: &str = "/run/balancer";
/// A daemon that lives has given a heartbeat within this time, unless the machine is very busy.
const BEATS_WITHIN: Duration = Duration::from_millis(1500);
/// A silence that is worth a word.
const LONG_SILENCE: Duration = Duration::from_secs(5);
/// More than any note has, in bytes.
const LONGEST: u64 = 256 << 10;

/// The notes of the daemon of one state directory, as they are now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DaemonNotes {
    /// The process of the daemon.
    pub running: Option<u32>,
    /// The daemon was this process, which is gone. Only where it ended by itself no note is left.
    pub ended: Option<u32>,
    /// The configuration file could not be put in force when it was last read again.
    pub failed_reload: Option<FailedReload>,
    /// What keeps connects of this node from being placed.
    pub placing: PlacingNotes,
}

/// What the daemon is, by its heartbeat and its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DaemonState {
    /// It has given no heartbeat since the data plane was loaded.
    Unborn,
    /// It gives heartbeats.
    Alive,
    /// It has given none for some seconds.
    Silent,
    /// It was this process, which is gone.
    Dead(u32),
    /// It has been silent for so long that nobody is refused any more.
    DeadOrStuck,
}

impl DaemonState {
    /// Whether it is taken for alive, in JSON and metrics.
    pub const fn is_alive(self) -> bool {
        matches!(self, Self::Alive | Self::Silent)
    }
}

/// A reload that came to nothing, or only to a part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailedReload {
    /// How long ago that was.
    pub age: Duration,
    /// What was wrong.
    pub error: String,
}

impl DaemonNotes {
    /// Reads the notes. What can't be read is not there.
    pub fn read(paths: &Paths) -> Self {
        let failed = Note::failed_reload(paths).read();
        let holder = Note::holder(paths).pid();
        Self {
            running: holder.filter(|pid| !is_ending(*pid)),
            ended: holder.filter(|pid| is_ending(*pid)),
            failed_reload: failed.and_then(|note| {
                let (since, error) = note.split_once('\n')?;
                let age = clock::monotonic_ns().saturating_sub(since.parse().ok()?);
                Some(FailedReload {
                    age: Duration::from_nanos(age),
                    error: error.trim_end().to_owned(),
                })
            }),
            placing: PlacingNotes::read(paths),
        }
    }

    /// What the daemon is.
    pub fn state(&self, daemon: &DaemonSnapshot) -> DaemonState {
        let age = daemon.heartbeat_age;
        // The number of a process that another process namespace gave says nothing here, so a
        // heartbeat must be missing, too.
        let beats = age.is_some_and(|age| age < BEATS_WITHIN);
        match (age, self.ended) {
            (None, _) => DaemonState::Unborn,
            (_, Some(pid)) if !beats => DaemonState::Dead(pid),
            (Some(age), _) if daemon.refuses && age < LONG_SILENCE => DaemonState::Alive,
            _ if daemon.refuses => DaemonState::Silent,
            _ => DaemonState::DeadOrStuck,
        }
    }
}

/// A file with one note.
#[derive(Debug)]
pub(super) struct Note(PathBuf);

impl Note {
    /// Which process holds the lock of the state directory.
    pub(super) fn holder(paths: &Paths) -> Self {
        Self::named(paths, "pid")
    }

    /// When a reload failed, and why.
    pub(super) fn failed_reload(paths: &Paths) -> Self {
        Self::named(paths, "reload")
    }

    /// Which backends are down, and since when.
    pub(super) fn down(paths: &Paths) -> Self {
        Self::named(paths, "down")
    }

    /// What keeps connects from being placed.
    pub(super) fn placing(paths: &Paths) -> Self {
        Self::named(paths, "placing")
    }

    fn named(paths: &Paths, what: &str) -> Self {
        let state_dir = paths.state_dir().to_string_lossy();
        let name = state_dir.trim_matches('/').replace('/', "-");
        Self(Path::new(DIRECTORY).join(format!("{name}.{what}")))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    pub(super) fn write(&self, text: &str) -> io::Result<()> {
        fs::create_dir_all(DIRECTORY)?;
        let mut options = File::options();
        options.write(true).create(true).truncate(true);
        // Where others may write they must not lead us elsewhere.
        options.custom_flags(libc::O_NOFOLLOW);
        options.open(&self.0)?.write_all(text.as_bytes())
    }

    /// Notes an error with the time.
    pub(super) fn write_error(&self, error: &str) -> io::Result<()> {
        self.write(&format!("{}\n{error}\n", clock::monotonic_ns()))
    }

    pub(super) fn read(&self) -> Option<String> {
        let mut text = String::new();
        let file = File::open(&self.0).ok()?;
        file.take(LONGEST).read_to_string(&mut text).ok()?;
        Some(text)
    }

    /// The process that the note is about.
    pub(super) fn pid(&self) -> Option<u32> {
        self.read()?.trim().parse().ok()
    }

    /// Takes the note away, where there is one.
    pub(super) fn remove(&self) {
        // Best effort: what stays is overwritten by the next daemon.
        let _ = fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// Names of our own in `/run/balancer`, removed at the end.
    struct Own(Paths, tempfile::TempDir);

    impl Own {
        fn new() -> Self {
            let directory = tempfile::tempdir().expect("a directory");
            Self(Paths::new(directory.path()), directory)
        }
    }

    impl Drop for Own {
        fn drop(&mut self) {
            Note::holder(&self.0).remove();
            Note::failed_reload(&self.0).remove();
        }
    }

    #[test]
    fn a_failed_reload_is_read_with_its_age_until_it_is_removed() {
        let own = Own::new();
        assert_eq!(DaemonNotes::read(&own.0), DaemonNotes::default());
        let note = Note::failed_reload(&own.0);
        note.write_error("a longer error: a.yaml:3:5: no")
            .expect("written");
        note.write_error("a.yaml:3:5: no").expect("written");
        let failed = DaemonNotes::read(&own.0).failed_reload.expect("noted");
        assert_eq!(failed.error, "a.yaml:3:5: no");
        assert!(failed.age < Duration::from_secs(60), "{failed:?}");
        note.write("garbage").expect("written");
        assert_eq!(DaemonNotes::read(&own.0).failed_reload, None);
        note.remove();
        assert_eq!(DaemonNotes::read(&own.0), DaemonNotes::default());
    }

    #[test]
    fn a_holder_that_is_gone_is_named() {
        let own = Own::new();
        let note = Note::holder(&own.0);
        note.write(&std::process::id().to_string())
            .expect("written");
        let notes = DaemonNotes::read(&own.0);
        assert_eq!(
            (notes.running, notes.ended),
            (Some(std::process::id()), None)
        );
        let mut gone = std::process::Command::new("true").spawn().expect("true");
        gone.wait().expect("it ends");
        note.write(&gone.id().to_string()).expect("written");
        let notes = DaemonNotes::read(&own.0);
        assert_eq!((notes.running, notes.ended), (None, Some(gone.id())));
    }

    #[test]
    fn a_note_is_written_through_no_symbolic_link() {
        let own = Own::new();
        let precious = own.1.path().join("precious");
        fs::write(&precious, "as it was").expect("written");
        fs::create_dir_all(DIRECTORY).expect("made");
        let note = Note::holder(&own.0);
        symlink(&precious, note.path()).expect("linked");
        note.write("1").expect_err("not followed");
        assert_eq!(fs::read_to_string(precious).expect("read"), "as it was");
    }
}
