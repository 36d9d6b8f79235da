//! The kernel's memory for small objects, by cache (`/proc/slabinfo`).

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};

/// How the names of caches begin that a socket takes memory from. Those of file systems grow and
/// shrink with what others do.
const OF_SOCKETS: [&str; 10] = [
    "TCP",
    "bpf",
    "eventpoll_",
    "filp",
    "kmalloc-",
    "request_sock_",
    "skbuff_",
    "sock_inode_cache",
    "tcp_bind",
    "tw_sock_",
];

/// Bytes of live objects by cache, of those caches that sockets use.
pub struct Slab(BTreeMap<String, f64>);

impl Slab {
    /// As it is now.
    ///
    /// # Errors
    /// When this is not root, or the kernel has no SLUB.
    pub fn read() -> Result<Self> {
        let text = fs::read_to_string("/proc/slabinfo").context("cannot read /proc/slabinfo")?;
        // Two lines of headings.
        let caches: Option<BTreeMap<_, _>> = text.lines().skip(2).map(cache).collect();
        let mut caches = caches.context("/proc/slabinfo is not as in version 2.1")?;
        caches.retain(|name, _| OF_SOCKETS.iter().any(|begin| name.starts_with(begin)));
        Ok(Self(caches))
    }

    /// Bytes that came since, by cache.
    pub fn since(&self, before: &Self) -> BTreeMap<String, f64> {
        let grown = |(cache, bytes): (&String, &f64)| {
            let before = before.0.get(cache).copied().unwrap_or(0.0);
            (cache.clone(), bytes - before)
        };
        self.0.iter().map(grown).collect()
    }
}

/// `name active_objs num_objs objsize …`.
fn cache(line: &str) -> Option<(String, f64)> {
    let mut words = line.split_whitespace();
    let name = words.next()?.to_owned();
    let active: f64 = words.next()?.parse().ok()?;
    let size: f64 = words.nth(1)?.parse().ok()?;
    Some((name, active * size))
}

#[cfg(test)]
mod tests {
    use super::cache;

    #[test]
    fn live_objects_count_with_their_size() {
        let line = "TCP  104 130  2496   13    8 : tunables    0    0    0 : slabdata     10     10      0";
        assert_eq!(cache(line), Some(("TCP".to_owned(), 104.0 * 2496.0)));
        assert_eq!(cache(""), None);
    }
}
