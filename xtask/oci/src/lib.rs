//! Container images as OCI archives, made without a container engine: of one layer, from files of
//! this machine.
//!
//! Equal inputs give equal bytes: there are no times and no owners, and everything is sorted.
#![forbid(unsafe_code)]

mod archive;
mod layer;
mod root;

pub use archive::Image;
pub use layer::Layer;
pub use root::Root;

use sha2::{Digest as _, Sha256};

/// Bytes in hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    let digit = |value: u8| char::from_digit(u32::from(value), 16).unwrap_or('?');
    let digits = |byte: &u8| [digit(byte >> 4), digit(byte & 0xf)];
    bytes.iter().flat_map(digits).collect()
}

/// A digest as OCI writes it.
fn digest(content: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(content)))
}
