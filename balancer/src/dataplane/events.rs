//! What the kernel half says: its events, and its log where it was built with one.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use aya::Ebpf;
use aya::maps::{MapData, RingBuf};
use aya_log::EbpfLogger;
use balancer_common::abi::{Address, Event, maps};
use bytes::Buf as _;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};
use tracing::warn;

use super::tables::Tables;

/// The shortest time between two batches of events: what happens meanwhile is followed at once, and
/// no flood of events keeps the daemon from anything else.
const PAUSE: Duration = Duration::from_millis(50);

/// The most events of a batch: as many as the ring holds.
const BATCH: usize = maps::EVENTS.entries as usize / size_of::<Event>();

/// The events of the kernel half, as they come.
pub struct Events {
    ring: AsyncFd<RingBuf<MapData>>,
    /// The next batch is not taken before.
    next: Instant,
}

impl Events {
    pub(super) fn open(directory: &Path) -> Result<Self> {
        let ring = Tables::events(directory)?;
        #[expect(
            deprecated,
            reason = "its successor is unsafe; the ring keeps its descriptor open for as long as it lives"
        )]
        let ring = AsyncFd::with_interest(ring, Interest::READABLE)
            .context("cannot watch the ring of events")?;
        let next = Instant::now();
        Ok(Self { ring, next })
    }

    /// Waits for events and takes those that are there, a ring full at the most; a while after it
    /// took some before. Cancel safe: nothing is taken before it returns.
    ///
    /// # Errors
    /// When the ring can't be watched any more.
    pub async fn next(&mut self) -> Result<Vec<Event>> {
        sleep_until(self.next).await;
        let ready = self.ring.readable_mut().await;
        let mut ready = ready.context("cannot watch the ring of events")?;
        let ring = ready.get_inner_mut();
        let mut events = Vec::new();
        while events.len() < BATCH {
            let Some(record) = ring.next() else {
                ready.clear_ready();
                break;
            };
            events.extend(parse(&record));
        }
        self.next = Instant::now() + PAUSE;
        Ok(events)
    }
}

/// The event in a record of the ring; `None`: the record is shorter than one.
pub fn parse(mut record: &[u8]) -> Option<Event> {
    if record.remaining() < size_of::<Event>() {
        return None;
    }
    Some(Event {
        kind: record.get_u16_ne(),
        service: record.get_u16_ne(),
        slot: record.get_u32_ne(),
        netns: record.get_u64_ne(),
        address: Address(std::array::from_fn(|_| record.get_u32_ne())),
        port: record.get_u16_ne(),
        zero: record.get_u16_ne(),
        pid: record.get_u32_ne(),
        tid: record.get_u32_ne(),
        zeros: record.get_u32_ne(),
    })
}

/// Passes on the log of one object for as long as it lives.
pub struct LogFollower(JoinHandle<()>);

impl Drop for LogFollower {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Hands what the kernel half of one object logs to `tracing`; one that was built without a log has
/// nothing to follow.
pub(super) fn follow_log(mut object: Ebpf) -> Option<LogFollower> {
    object.map("AYA_LOGS")?;
    let logger = EbpfLogger::init(&mut object).map_err(anyhow::Error::from);
    #[expect(
        deprecated,
        reason = "its successor is unsafe; the logger keeps its descriptor open for as long as it lives"
    )]
    let watched = logger.and_then(|logger| Ok(AsyncFd::with_interest(logger, Interest::READABLE)?));
    let mut logger = watched
        .inspect_err(|error| warn!("the kernel half's log can't be read: {error:#}"))
        .ok()?;
    Some(LogFollower(tokio::spawn(async move {
        while let Ok(mut ready) = logger.readable_mut().await {
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    })))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BufMut as _;

    #[test]
    fn an_event_is_read_as_the_kernel_half_lays_it_out() {
        let mut record = Vec::new();
        record.put_u16_ne(4);
        record.put_u16_ne(2);
        record.put_u32_ne(u32::MAX);
        record.put_u64_ne(77);
        record.put_slice(&[0; 10]);
        record.put_slice(&[0xff, 0xff, 10, 0, 0, 9]);
        record.put_u16_ne(43_210);
        record.put_u16_ne(0);
        record.put_u32_ne(1);
        record.put_u32_ne(2);
        record.put_u32_ne(0);
        assert_eq!(record.len(), size_of::<Event>());
        let event = parse(&record).unwrap();
        assert_eq!(
            (event.kind, event.service, event.slot, event.netns),
            (4, 2, u32::MAX, 77)
        );
        let address = std::net::IpAddr::from([10, 0, 0, 9]);
        assert_eq!(std::net::IpAddr::from(event.address), address);
        assert_eq!((event.port, event.pid, event.tid), (43_210, 1, 2));
        assert_eq!(parse(&record[1..]), None);
    }
}
