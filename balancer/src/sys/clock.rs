//! The kernel's clocks, as its BPF programs see them.

use std::{io, time::Duration};

use nix::time::{ClockId, clock_getres, clock_gettime};

/// `CLOCK_MONOTONIC`: nanoseconds since boot, sleep not counted. This is what `bpf_ktime_get_ns`
/// reads.
///
/// # Panics
/// Never on Linux: `clock_gettime` of this clock cannot fail, and its value fits 64 bits for 584
/// years.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("CLOCK_MONOTONIC is always there");
    u64::try_from(Duration::from(now).as_nanos()).expect("fewer than 584 years since boot")
}

/// Processor time that this process has taken, all its threads together.
///
/// # Panics
/// Never on Linux: `clock_gettime` of this clock cannot fail.
pub fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID);
    Duration::from(time.expect("CLOCK_PROCESS_CPUTIME_ID is always there"))
}

/// How many jiffies a second has (`CONFIG_HZ`): the unit of `bpf_jiffies64` and of the socket
/// fields that hold jiffies.
///
/// Read from the resolution of `CLOCK_MONOTONIC_COARSE`, which is one tick (`TICK_NSEC`,
/// kernel/time/vsyscall.c), so that no kernel configuration file is needed.
///
/// # Errors
/// Where the clock is missing or its resolution isn't that of a tick, as under emulated kernels.
pub fn jiffies_per_second() -> io::Result<u32> {
    let tick = Duration::from(clock_getres(ClockId::CLOCK_MONOTONIC_COARSE)?).as_nanos();
    (1_000_000_000 + tick / 2)
        .checked_div(tick)
        .and_then(|hz| u32::try_from(hz).ok())
        .filter(|hz| (10..=10_000).contains(hz))
        .ok_or_else(|| {
            io::Error::other(format!(
                "CLOCK_MONOTONIC_COARSE has a resolution of {tick} ns, which is no kernel tick"
            ))
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    /// What a counter does while a thread sleeps, and the shortest and the longest time that can
    /// have passed between its two readings, however slow this machine is.
    fn passed(pause: Duration, read: impl Fn() -> u64) -> (u64, Duration, Duration) {
        let outer = Instant::now();
        let first = read();
        let inner = Instant::now();
        std::thread::sleep(pause);
        let least = inner.elapsed();
        let second = read();
        (second - first, least, outer.elapsed())
    }

    #[test]
    fn monotonic_goes_forward_like_instant() {
        let (passed, least, most) = passed(Duration::from_millis(20), monotonic_ns);
        assert!(
            (least.as_nanos()..=most.as_nanos()).contains(&u128::from(passed)),
            "{passed} ns in {least:?} to {most:?}"
        );
    }

    /// `USER_HZ` is no witness (always 100), so the kernel's own count is: `/proc/timer_list`
    /// prints jiffies.
    #[test]
    fn jiffies_per_second_is_the_rate_of_jiffies() {
        let jiffies = || -> u64 {
            let list =
                std::fs::read_to_string("/proc/timer_list").expect("root can read the timer list");
            let line = list
                .lines()
                .find_map(|line| line.strip_prefix("jiffies: "))
                .expect("it prints jiffies");
            line.trim().parse().expect("a number")
        };
        let hz = jiffies_per_second().expect("this kernel has ticks");
        let (passed, least, most) = passed(Duration::from_millis(500), jiffies);
        // One more or less: where within a tick the readings were.
        let (fewest, most) = (
            (least * hz).as_secs().saturating_sub(1),
            (most * hz).as_secs() + 2,
        );
        assert!(
            (fewest..=most).contains(&passed),
            "{passed} jiffies, expected {fewest} to {most} at HZ = {hz}"
        );
    }
}
