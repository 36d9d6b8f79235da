//! A root directory as images carry it: a tar file.

use std::io::Write;
use std::path::Path;

use anyhow::{Context as _, Result};
use flate2::{Compression, GzBuilder, read::GzDecoder};
use tar::{Builder, EntryType, Header};

use crate::digest;
use crate::root::{Entry, Root};

/// A layer of an image.
pub struct Layer {
    /// The digest of the tar file before it is compressed: it makes up an image's identity.
    pub(crate) diff_id: String,
    pub(crate) content: Vec<u8>,
    compressed: bool,
}

impl Layer {
    /// Not compressed: for an image that is unpacked on this machine right away.
    ///
    /// # Errors
    /// When a path does not fit a tar file.
    pub fn plain(root: Root) -> Result<Self> {
        let content = tar(root)?;
        Ok(Self {
            diff_id: digest(&content),
            content,
            compressed: false,
        })
    }

    /// Compressed with gzip: for an image that is sent to other machines.
    ///
    /// # Errors
    /// When a path does not fit a tar file.
    pub fn compressed(root: Root) -> Result<Self> {
        let plain = Self::plain(root)?;
        let mut gzip = GzBuilder::new()
            .mtime(0)
            .write(Vec::new(), Compression::best());
        let written = gzip.write_all(&plain.content).and_then(|()| gzip.finish());
        Ok(Self {
            content: written.context("cannot compress the layer")?,
            compressed: true,
            ..plain
        })
    }

    /// Puts its files into a directory.
    ///
    /// # Errors
    /// When a file can't be written.
    pub fn unpack(&self, directory: &Path) -> Result<()> {
        let content = &*self.content;
        let unpacked = if self.compressed {
            tar::Archive::new(GzDecoder::new(content)).unpack(directory)
        } else {
            tar::Archive::new(content).unpack(directory)
        };
        unpacked.with_context(|| format!("cannot unpack the layer to {}", directory.display()))
    }

    pub(crate) const fn media_type(&self) -> &'static str {
        if self.compressed {
            "application/vnd.oci.image.layer.v1.tar+gzip"
        } else {
            "application/vnd.oci.image.layer.v1.tar"
        }
    }
}

fn tar(root: Root) -> Result<Vec<u8>> {
    let mut tar = Builder::new(Vec::new());
    for (path, entry) in root.0 {
        match entry {
            Entry::Directory { mode } => append(&mut tar, &path, EntryType::Directory, mode, &[]),
            Entry::File { mode, content } => {
                append(&mut tar, &path, EntryType::Regular, mode, &content)
            }
            Entry::Link { to } => tar
                .append_link(&mut header(EntryType::Symlink, 0o777, 0), &path, to)
                .with_context(|| format!("cannot put {path} into the image")),
        }?;
    }
    tar.into_inner().context("cannot write the layer")
}

/// Adds a file or a directory to a tar file.
pub(crate) fn append<W: Write>(
    tar: &mut Builder<W>,
    path: &str,
    kind: EntryType,
    mode: u32,
    content: &[u8],
) -> Result<()> {
    tar.append_data(&mut header(kind, mode, content.len()), path, content)
        .with_context(|| format!("cannot put {path} into the image"))
}

/// All zero but for what is set: owner root, and no time.
fn header(kind: EntryType, mode: u32, size: usize) -> Header {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size as u64);
    header
}
