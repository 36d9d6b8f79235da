//! BPF array maps that kernel and user space see at once (`BPF_F_MMAPABLE`).

use std::{
    io,
    num::NonZeroUsize,
    os::fd::{AsFd, AsRawFd as _},
    sync::atomic::AtomicU64,
};

use aya_obj::generated::{BPF_F_MMAPABLE, bpf_map_type::BPF_MAP_TYPE_ARRAY};
use memmap2::{MmapOptions, MmapRaw};

use super::bpf::{MapInfo, map_info};

/// The kernel rounds every element of an array up to this (kernel/bpf/arraymap.c).
const WORD: usize = size_of::<u64>();

/// An array map, mapped for reading and writing: every element is a row of 64-bit words, each of
/// them an atomic that BPF programs change at the same time.
#[derive(Debug)]
pub struct SharedArray {
    mapping: MmapRaw,
    /// Elements of the map.
    len: u32,
    /// Words of one element.
    stride: NonZeroUsize,
}

impl SharedArray {
    /// Maps a whole array map.
    ///
    /// # Errors
    /// `InvalidInput` where the map is no mappable array, its values aren't `element_size` bytes or
    /// it hasn't `len` of them: then it was made by another version of the program. `EPERM` where
    /// the map is frozen or opened for reading only.
    pub fn open(map: impl AsFd, element_size: usize, len: u32) -> io::Result<Self> {
        let layout = Layout::check(&map, element_size, len)?;
        let mapping = MmapOptions::new()
            .len(layout.bytes)
            .map_raw(map.as_fd().as_raw_fd())?;
        Ok(Self {
            mapping,
            len: layout.len,
            stride: layout.stride,
        })
    }

    /// Word number `word` of element `index`.
    ///
    /// # Panics
    /// Where the element or the word is outside the map.
    pub fn word(&self, index: u32, word: usize) -> &AtomicU64 {
        let stride = self.stride.get();
        assert!(
            index < self.len && word < stride,
            "word {word} of element {index} is outside a map of {} x {stride}",
            self.len
        );
        let at = index as usize * stride + word;
        #[expect(clippy::cast_ptr_alignment, reason = "a mapping starts at a page")]
        let base = self.mapping.as_mut_ptr().cast::<AtomicU64>();
        // SAFETY: the mapping starts at a page and so is aligned; it spans at least `len * stride`
        // words (`Layout`), `at` is below that (asserted above), it lives as long as `self`, and a
        // BPF array can't shrink under it. BPF programs and other processes change the words only
        // whole and through atomics.
        unsafe { &*base.add(at) }
    }
}

struct Layout {
    bytes: usize,
    len: u32,
    stride: NonZeroUsize,
}

impl Layout {
    fn check(map: &impl AsFd, element_size: usize, len: u32) -> io::Result<Self> {
        let info = map_info(map)?;
        let wrong = |what: String| {
            Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{} {what}", describe(&info)),
            ))
        };
        if info.kind != BPF_MAP_TYPE_ARRAY as u32 || info.flags & BPF_F_MMAPABLE == 0 {
            return wrong("is no array that can be mapped (BPF_F_MMAPABLE)".to_owned());
        }
        if info.value_size as usize != element_size || info.max_entries != len {
            let (size, entries) = (info.value_size, info.max_entries);
            return wrong(format!(
                "holds {entries} values of {size} bytes where {len} of {element_size} were expected"
            ));
        }
        let Some(stride) = NonZeroUsize::new(element_size.div_ceil(WORD)) else {
            return wrong("has empty values".to_owned());
        };
        let bytes = (len as usize)
            .checked_mul(stride.get())
            .and_then(|words| words.checked_mul(WORD));
        match bytes {
            Some(bytes) if bytes > 0 => Ok(Self { bytes, len, stride }),
            _ => wrong("is empty or too large to map".to_owned()),
        }
    }
}

fn describe(info: &MapInfo) -> String {
    format!("map {} (id {})", info.name, info.id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use aya_obj::generated::bpf_map_type::BPF_MAP_TYPE_HASH;
    use std::{os::fd::OwnedFd, sync::atomic::Ordering};
    use testbpf::{MapSpec, map_create};

    fn array(value_size: u32, max_entries: u32) -> OwnedFd {
        map_create(&MapSpec {
            value_size,
            max_entries,
            flags: BPF_F_MMAPABLE,
            ..MapSpec::new(BPF_MAP_TYPE_ARRAY, "shared")
        })
        .expect("an array")
    }

    #[test]
    fn writes_are_seen_through_every_mapping() {
        let map = array(20, 1000);
        let (array, view) = (
            SharedArray::open(&map, 20, 1000).expect("mapped"),
            SharedArray::open(&map, 20, 1000).expect("mapped"),
        );
        for index in 0..1000 {
            for word in 0..3 {
                array
                    .word(index, word)
                    .fetch_add(u64::from(index) * 10 + word as u64, Ordering::Relaxed);
            }
        }
        for index in 0..1000 {
            for word in 0..3 {
                assert_eq!(
                    view.word(index, word).load(Ordering::Relaxed),
                    u64::from(index) * 10 + word as u64
                );
            }
        }
        drop(map);
        assert_eq!(
            view.word(999, 2).load(Ordering::Relaxed),
            9992,
            "a mapping outlives the descriptor"
        );
    }

    #[test]
    fn another_layout_is_refused() {
        let map = array(16, 10);
        for (size, len) in [(8, 10), (16, 11), (24, 10), (16, 9)] {
            let error = SharedArray::open(&map, size, len).expect_err("another layout");
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
            assert!(
                error.to_string().contains("shared")
                    && error.to_string().contains("10 values of 16 bytes"),
                "{error}"
            );
        }
        let hash = map_create(&MapSpec {
            value_size: 16,
            max_entries: 10,
            ..MapSpec::new(BPF_MAP_TYPE_HASH, "hash")
        })
        .expect("hash");
        assert!(
            SharedArray::open(&hash, 16, 10)
                .expect_err("no array")
                .to_string()
                .contains("BPF_F_MMAPABLE")
        );
        assert!(
            SharedArray::open(std::fs::File::open("/dev/zero").expect("open"), 16, 10).is_err()
        );
    }

    #[test]
    fn outside_is_a_panic_and_not_a_read() {
        let view = SharedArray::open(array(8, 4), 8, 4).expect("mapped");
        assert_eq!(view.word(3, 0).load(Ordering::Relaxed), 0);
        for (index, word) in [(4, 0), (0, 1), (u32::MAX, usize::MAX)] {
            assert!(
                std::panic::catch_unwind(|| view.word(index, word).load(Ordering::Relaxed))
                    .is_err()
            );
        }
    }
}
