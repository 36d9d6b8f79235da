//! The heartbeat: the sign of life that the kernel half refuses by.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::dataplane::Pulse;
use crate::sys::clock;

/// The longest time between two heartbeats.
const LONGEST: Duration = Duration::from_millis(500);
/// Heartbeats that may be missed before the kernel fails open.
const BEATS: u32 = 8;
/// The loop is taken for dead when it has not turned for one part in this many of the time after
/// which the kernel fails open.
const TRUSTED: u32 = 2;

/// Gives the heartbeat at each turn of the daemon's loop; and, on a thread of its own, while the
/// loop is busy: for as long as it has turned within half of `fail_open_after`. So whatever keeps
/// the loop busy does not open the services, and a loop that hangs opens them after one and a half
/// times `fail_open_after` at the most.
pub struct Heartbeat(Arc<Shared>);

struct Shared {
    pulse: Pulse,
    /// When the loop has turned last, ns of `CLOCK_MONOTONIC`; 0: the daemon is not to be believed
    /// yet.
    turned: AtomicU64,
    /// How long after the last heartbeat the kernel stops refusing, ns.
    limit: AtomicU64,
}

impl Heartbeat {
    /// A heartbeat that has not begun.
    pub fn new(pulse: Pulse, fail_open_after: Duration) -> Self {
        let heartbeat = Self(Arc::new(Shared {
            pulse,
            turned: AtomicU64::new(0),
            limit: AtomicU64::new(0),
        }));
        heartbeat.set_limit(fail_open_after);
        heartbeat
    }

    /// The kernel is to stop refusing so long after the last heartbeat, from the next one on.
    pub fn set_limit(&self, fail_open_after: Duration) {
        let limit = u64::try_from(fail_open_after.as_nanos()).unwrap_or(u64::MAX);
        self.0.limit.store(limit, Ordering::Relaxed);
    }

    /// Gives the first heartbeat: from now on the quotas in force are to be believed.
    pub fn begin(&self) {
        let now = clock::monotonic_ns();
        self.0.turned.store(now, Ordering::Relaxed);
        self.0.beat();
    }

    /// The loop has turned, or has come a step further in long work. Nothing happens before the
    /// first heartbeat.
    pub fn turn(&self) {
        if self.0.turned.load(Ordering::Relaxed) != 0 {
            self.begin();
        }
    }

    /// Goes on with it also while the loop is busy. The thread has what privileges the caller has
    /// left.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start_thread(&self) -> Result<()> {
        let shared = Arc::clone(&self.0);
        let beat = move || {
            loop {
                thread::sleep(LONGEST.min(shared.limit() / BEATS));
                let busy_for = shared.busy_for(clock::monotonic_ns());
                if busy_for <= shared.limit() / TRUSTED {
                    shared.beat();
                }
            }
        };
        let thread = thread::Builder::new().name("heartbeat".to_owned());
        let started = thread.spawn(beat).map(drop);
        started.context("cannot start the thread of the heartbeat")
    }
}

impl Shared {
    fn limit(&self) -> Duration {
        Duration::from_nanos(self.limit.load(Ordering::Relaxed))
    }

    fn busy_for(&self, now: u64) -> Duration {
        Duration::from_nanos(now.saturating_sub(self.turned.load(Ordering::Relaxed)))
    }

    fn beat(&self) {
        self.pulse.beat(self.limit());
    }
}
