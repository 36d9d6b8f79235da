//! What tells one file from another.

use std::{io, os::fd::AsFd, path::Path};

use nix::sys::stat::{FileStat, fstat, lstat, stat};

/// A file while it exists, whatever its name. The kernel may give the numbers again once it is
/// gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId {
    /// The device number of its file system.
    pub device: u64,
    /// The number of its inode on that file system.
    pub inode: u64,
}

impl FileId {
    /// Which file a descriptor names.
    ///
    /// # Errors
    /// Whatever `fstat(2)` fails with.
    pub fn of(file: impl AsFd) -> io::Result<Self> {
        Ok(fstat(file)?.into())
    }

    /// Which file a path leads to. Symbolic links are followed.
    ///
    /// # Errors
    /// Whatever `stat(2)` fails with, such as `ENOENT`.
    pub fn at(path: &Path) -> io::Result<Self> {
        Ok(stat(path)?.into())
    }

    /// Which file, or symbolic link, has this name.
    ///
    /// # Errors
    /// Whatever `lstat(2)` fails with, such as `ENOENT`.
    pub fn named(path: &Path) -> io::Result<Self> {
        Ok(lstat(path)?.into())
    }
}

impl From<FileStat> for FileId {
    fn from(stat: FileStat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
        }
    }
}
