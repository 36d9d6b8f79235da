//! What a process may have open, and what it means when it can't have more.

use std::{
    fs,
    io::{self, ErrorKind},
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the soft limit of open files to the hard one: a guarded netns takes a descriptor, and the
/// soft limit that services get is meant for programs that use `select(2)`.
///
/// # Errors
/// Whatever `setrlimit(2)` fails with.
pub fn raise_open_files() -> io::Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(())
}

/// How many more files this process may open.
///
/// # Errors
/// Where `/proc` can't be read, for want of a descriptor too.
pub fn spare_files() -> io::Result<u64> {
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let open = fs::read_dir("/proc/self/fd")?.count();
    Ok(soft.saturating_sub(open as u64))
}

/// Whether a look at something failed because this process, or the machine, is short of
/// descriptors, memory or threads: that says nothing of what was looked for.
pub fn is_shortage(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS | libc::EAGAIN)
    )
}

/// What a look saw; `None`: what it looked for is gone, hidden or something else.
///
/// # Errors
/// Where it could not look: see [`is_shortage`].
pub fn seen<T>(look: io::Result<T>) -> io::Result<Option<T>> {
    match look {
        Ok(seen) => Ok(Some(seen)),
        Err(error) if is_shortage(&error) => Err(error),
        Err(_) => Ok(None),
    }
}

/// What a look saw; `None`: nothing has that name. Whatever else went wrong says nothing of it.
///
/// # Errors
/// Any but `ENOENT` and `ENOTDIR`.
pub fn present<T>(look: io::Result<T>) -> io::Result<Option<T>> {
    match look {
        Ok(seen) => Ok(Some(seen)),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_has_no_name_is_absent() {
        let of = |errno| present::<()>(Err(io::Error::from_raw_os_error(errno)));
        for absent in [libc::ENOENT, libc::ENOTDIR] {
            assert_eq!(of(absent).expect("an answer"), None, "{absent}");
        }
        for unknown in [libc::EMFILE, libc::ENOMEM, libc::EACCES, libc::EIO] {
            assert!(of(unknown).is_err(), "{unknown}");
        }
        assert_eq!(present(Ok(7)).expect("an answer"), Some(7));
    }

    #[test]
    fn only_a_shortage_is_no_answer() {
        let of = |errno| seen::<()>(Err(io::Error::from_raw_os_error(errno)));
        for shortage in [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::EAGAIN] {
            assert!(of(shortage).is_err(), "{shortage}");
        }
        for gone in [libc::ENOENT, libc::ESRCH, libc::EACCES, libc::EINVAL] {
            assert_eq!(of(gone).expect("an answer"), None, "{gone}");
        }
        assert_eq!(seen(Ok(7)).expect("an answer"), Some(7));
    }

    #[test]
    fn a_file_that_is_opened_is_one_less_to_spare() {
        assert!(spare_files().expect("they are counted") > 0);
    }
}
