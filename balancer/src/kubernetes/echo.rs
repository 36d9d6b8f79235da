//! Whether what the API server tells is current: what this daemon writes has to come back.
//!
//! A server whose database is gone goes on answering from its memory, and so does one that was cut
//! off from the others. No request fails then, and nothing is new.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

/// So long a write may be under way: a watch brings it within milliseconds, and begins anew within
/// seconds.
const MAY_TAKE: Duration = Duration::from_secs(10);

/// The writes of the own report that have not come back.
#[derive(Debug, Default)]
pub(crate) struct Echo(Mutex<Writes>);

#[derive(Debug, Default)]
struct Writes {
    /// The stamp of the last write.
    last: u64,
    /// The stamp of the oldest write that has not come back, and when it was tried.
    oldest: Option<(u64, Instant)>,
}

impl Echo {
    fn with<T>(&self, work: impl FnOnce(&mut Writes) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The stamp of a write that is about to be tried: milliseconds since 1970, and more than that
    /// of any before.
    pub(crate) fn stamp(&self) -> u64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = u64::try_from(now.unwrap_or_default().as_millis()).unwrap_or_default();
        self.with(|writes| {
            writes.last = now.max(writes.last.saturating_add(1));
            writes.oldest.get_or_insert((writes.last, Instant::now()));
            writes.last
        })
    }

    /// Nothing is to come back: the report was taken away.
    pub(crate) fn forget(&self) {
        self.with(|writes| writes.oldest = None);
    }

    /// For how long a write has not come back; zero where that is no longer than it may take.
    /// `seen` is the stamp of the own report as the API server tells it.
    pub(crate) fn overdue(&self, seen: Option<u64>) -> Duration {
        self.with(|writes| {
            if let (Some(seen), Some((oldest, _))) = (seen, writes.oldest)
                && (oldest..=writes.last).contains(&seen)
            {
                let is_behind = seen < writes.last;
                writes.oldest = is_behind.then(|| (seen + 1, Instant::now()));
            }
            let since = writes.oldest.map(|(_, since)| since.elapsed());
            since.filter(|time| *time > MAY_TAKE).unwrap_or_default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_a_write_of_ones_own_that_comes_back_shows_that_answers_are_current() {
        let echo = Echo::default();
        assert_eq!(echo.overdue(None), Duration::ZERO, "nothing was written");
        let first = echo.stamp();
        tokio::time::advance(Duration::from_secs(9)).await;
        assert_eq!(echo.overdue(None), Duration::ZERO);
        let second = echo.stamp();
        assert!(second > first);
        tokio::time::advance(Duration::from_secs(9)).await;
        for old in [None, Some(first - 1), Some(second + 1)] {
            assert_eq!(echo.overdue(old), Duration::from_secs(18), "{old:?}");
        }
        assert_eq!(echo.overdue(Some(first)), Duration::ZERO);
        tokio::time::advance(Duration::from_secs(11)).await;
        assert_eq!(echo.overdue(Some(first)), Duration::from_secs(11));
        assert_eq!(echo.overdue(Some(second)), Duration::ZERO);
        tokio::time::advance(Duration::from_secs(99)).await;
        assert_eq!(echo.overdue(Some(second)), Duration::ZERO);
        echo.stamp();
        echo.forget();
        tokio::time::advance(Duration::from_secs(99)).await;
        assert_eq!(echo.overdue(None), Duration::ZERO);
    }
}
