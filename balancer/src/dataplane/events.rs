//! What the kernel half says: its events, and its log where it was built with one.

use std::path::Path;

use anyhow::{Context as _, Result};
use aya::Ebpf;
use aya::maps::{MapData, RingBuf};
use aya_log::EbpfLogger;
use balancer_common::abi::Event;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tracing::warn;

use super::tables::Tables;

/// The events of the kernel half, as they come.
pub struct Events(AsyncFd<RingBuf<MapData>>);

impl Events {
    pub(super) fn open(directory: &Path) -> Result<Self> {
        let ring = Tables::events(directory)?;
        #[expect(
            deprecated,
            reason = "its successor is unsafe; the ring keeps its descriptor open for as long as it lives"
        )]
        let ring = AsyncFd::with_interest(ring, Interest::READABLE)
            .context("cannot watch the ring of events")?;
        Ok(Self(ring))
    }

    /// Waits for events and takes all that are there. Cancel safe: nothing is taken before it returns.
    ///
    /// # Errors
    /// When the ring can't be watched any more.
    pub async fn next(&mut self) -> Result<Vec<Event>> {
        let mut ready = self
            .0
            .readable_mut()
            .await
            .context("cannot watch the ring of events")?;
        let ring = ready.get_inner_mut();
        let mut events = Vec::new();
        while let Some(record) = ring.next() {
            events.extend(Event::from_bytes(&record));
        }
        ready.clear_ready();
        Ok(events)
    }
}

/// Hands what the kernel half of one object logs to `tracing`; one that was built without a log has nothing to follow.
pub(super) fn follow_log(mut object: Ebpf) {
    if object.map("AYA_LOGS").is_none() {
        return;
    }
    let logger = EbpfLogger::init(&mut object).map_err(anyhow::Error::from);
    #[expect(
        deprecated,
        reason = "its successor is unsafe; the logger keeps its descriptor open for as long as it lives"
    )]
    let watched = logger.and_then(|logger| Ok(AsyncFd::with_interest(logger, Interest::READABLE)?));
    match watched {
        Ok(mut logger) => {
            tokio::spawn(async move {
                while let Ok(mut ready) = logger.readable_mut().await {
                    ready.get_inner_mut().flush();
                    ready.clear_ready();
                }
            });
        }
        Err(error) => warn!("the kernel half's log can't be read: {error:#}"),
    }
}
