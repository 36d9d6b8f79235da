//! The sources that the kernel half has refused.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use balancer_common::Reason;
use balancer_common::abi::{Address, Refusals, RefusedKey, ticks};
use bytes::Buf as _;

use super::tables::Tables;
use crate::sys::{bpf, clock};

/// A source, and how often a service has refused it since this was asked last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefusedSource {
    /// Id of the service.
    pub service: u16,
    /// Cookie of the netns that it was refused in.
    pub netns: u64,
    /// The source's address.
    pub source: IpAddr,
    /// How often it was refused.
    pub count: u64,
    /// How long ago it was refused first.
    pub first: Duration,
    /// How long ago it was refused last.
    pub last: Duration,
    /// Why it was refused last.
    pub reason: Option<Reason>,
}

/// Takes the sources that were refused since this was done last. Of more than the map holds some
/// are missing.
///
/// # Errors
/// When the map can't be read.
pub fn take(tables: &Tables) -> Result<Vec<RefusedSource>> {
    let taken = bpf::map_take_all(tables.refused.fd())
        .context("cannot take the refused sources out of the map REFUSED")?;
    let now = ticks(clock::monotonic_ns());
    let sources = taken
        .iter()
        .filter_map(|(key, value)| source(key, value, now));
    Ok(sources.collect())
}

fn source(mut key: &[u8], mut value: &[u8], now: u64) -> Option<RefusedSource> {
    if key.len() < size_of::<RefusedKey>() || value.len() < size_of::<Refusals>() {
        return None;
    }
    let netns = key.get_u64_ne();
    let source = Address(std::array::from_fn(|_| key.get_u32_ne()));
    let service = u16::try_from(key.get_u32_ne()).ok()?;
    let count = value.get_u64_ne();
    let mut ago = || time_of(now.saturating_sub(value.get_u64_ne()));
    let (first, last) = (ago(), ago());
    let reason = usize::try_from(value.get_u64_ne()).ok();
    Some(RefusedSource {
        service,
        netns,
        source: source.into(),
        count,
        first,
        last,
        reason: reason.and_then(Reason::from_index),
    })
}

/// The time of so many ticks.
const fn time_of(ticks: u64) -> Duration {
    Duration::from_nanos(ticks.saturating_mul(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BufMut as _;

    #[test]
    fn a_source_is_read_as_the_kernel_half_lays_it_out() {
        let mut key = Vec::new();
        key.put_u64_ne(77);
        key.put_slice(&[0; 10]);
        key.put_slice(&[0xff, 0xff, 10, 0, 0, 9]);
        key.put_u32_ne(2);
        key.put_u32_ne(0);
        let mut value = Vec::new();
        for word in [40, 1000, 1900, 3] {
            value.put_u64_ne(word);
        }
        assert_eq!(
            (key.len(), value.len()),
            (size_of::<RefusedKey>(), size_of::<Refusals>())
        );
        let expected = RefusedSource {
            service: 2,
            netns: 77,
            source: [10, 0, 0, 9].into(),
            count: 40,
            first: time_of(1000),
            last: time_of(100),
            reason: Reason::from_index(3),
        };
        assert_eq!(source(&key, &value, 2000), Some(expected));
        assert_eq!(source(&key[1..], &value, 2000), None);
        assert_eq!(source(&key, &value[1..], 2000), None);
        // Another CPU's clock may be ahead.
        assert_eq!(
            source(&key, &value, 0).map(|source| source.first),
            Some(Duration::ZERO)
        );
    }
}
