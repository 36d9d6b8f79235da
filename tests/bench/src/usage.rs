//! What a process uses.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

/// Processor time of all its threads (`/proc/PID/task/TID/schedstat`, nanoseconds first).
///
/// # Errors
/// When the process is gone.
pub fn processor_time(pid: u32) -> Result<Duration> {
    let mut sum = 0;
    let tasks = Path::new("/proc").join(pid.to_string()).join("task");
    for task in fs::read_dir(&tasks).context("the process is gone")? {
        let text = fs::read_to_string(task?.path().join("schedstat"))
            .context("cannot read schedstat: the kernel lacks CONFIG_SCHED_INFO")?;
        let first = text.split_whitespace().next().unwrap_or_default();
        sum += first
            .parse::<u64>()
            .context("schedstat begins with a number")?;
    }
    Ok(Duration::from_nanos(sum))
}

/// Its memory in megabytes of 10^6 bytes.
///
/// # Errors
/// When the process is gone.
pub fn resident(pid: u32) -> Result<f64> {
    let status =
        fs::read_to_string(format!("/proc/{pid}/status")).context("the process is gone")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB"));
    let kilobytes: f64 = kilobytes
        .and_then(|text| text.trim().parse().ok())
        .context("/proc/PID/status says VmRSS")?;
    Ok(kilobytes * 1024.0 / 1e6)
}
