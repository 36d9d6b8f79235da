//! How many connections each OAP has over time: a look at all socket tables, twice a second.

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::layout::PORT;

const BETWEEN_LOOKS: Duration = Duration::from_millis(500);
/// The state ESTABLISHED, as `/proc/net/tcp` has it.
const ESTABLISHED: &str = "01";

/// Connections of each OAP, by its process.
type Look = BTreeMap<u32, u32>;
/// Looks, and when: seconds since the beginning.
type Looks = Vec<(f64, Look)>;

/// What is seen until it is dropped.
pub struct Recording {
    /// What it shows.
    pub title: &'static str,
    marks: Vec<(f64, String)>,
    begun: Instant,
    looks: Arc<Mutex<Looks>>,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Recording {
    /// Begins.
    pub fn begin(title: &'static str) -> Self {
        let (looks, ended) = (Arc::default(), Arc::default());
        let begun = Instant::now();
        let mut recording = Self {
            title,
            marks: Vec::new(),
            begun,
            looks: Arc::clone(&looks),
            ended: Arc::clone(&ended),
            thread: None,
        };
        recording.thread = Some(thread::spawn(move || watch(begun, &looks, &ended)));
        recording
    }

    /// Something happens now.
    pub fn mark(&mut self, what: &str) {
        let now = self.begun.elapsed().as_secs_f64();
        self.marks.push((now, what.to_owned()));
    }

    /// Ends: what follows is not part of it.
    pub fn end(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It has printed why it panicked.
            let _ = thread.join();
        }
    }

    /// What happened, and when: seconds since the beginning.
    pub fn marks(&self) -> &[(f64, String)] {
        &self.marks
    }

    /// How long it is, in seconds.
    pub fn seconds(&self) -> f64 {
        let looks = self.looks.lock().unwrap_or_else(PoisonError::into_inner);
        looks.last().map_or(0.0, |(at, _)| *at)
    }

    /// The connections of each OAP over time, in the order in which OAPs came.
    pub fn lines(&self) -> Vec<Vec<(f64, f64)>> {
        let looks = self.looks.lock().unwrap_or_else(PoisonError::into_inner);
        let mut lines: BTreeMap<u32, Vec<(f64, f64)>> = BTreeMap::new();
        for (at, look) in looks.iter() {
            for (process, connections) in look {
                let point = (*at, f64::from(*connections));
                lines.entry(*process).or_default().push(point);
            }
        }
        lines.into_values().collect()
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        self.end();
    }
}

fn watch(begun: Instant, looks: &Mutex<Looks>, ended: &AtomicBool) {
    while !ended.load(Ordering::Relaxed) {
        let now = (begun.elapsed().as_secs_f64(), look());
        let mut looks = looks.lock().unwrap_or_else(PoisonError::into_inner);
        looks.push(now);
        drop(looks);
        thread::sleep(BETWEEN_LOOKS);
    }
}

/// The OAPs that are pods, found without the API server, which has enough to do.
fn look() -> Look {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    ids.filter(|id| is_oap(*id))
        .filter_map(|id| Some((id, established(id)?)))
        .collect()
}

fn is_oap(process: u32) -> bool {
    let read = |file: &str| fs::read_to_string(format!("/proc/{process}/{file}"));
    read("comm").is_ok_and(|name| name.trim() == "standin-oap")
        && read("cgroup").is_ok_and(|cgroups| cgroups.contains("kubepods"))
}

/// How many connections to the port of OAPs the netns of a process has; `None`: it has ended.
fn established(process: u32) -> Option<u32> {
    let mut number = 0;
    for table in ["tcp", "tcp6"] {
        let table = fs::read_to_string(format!("/proc/{process}/net/{table}")).ok()?;
        let rows = table.lines().skip(1).filter(|row| is_accepted(row));
        number += u32::try_from(rows.count()).ok()?;
    }
    Some(number)
}

/// `0: 00000000:2E18 00000000:0000 0A …`: number, own address, other address, state.
fn is_accepted(row: &str) -> bool {
    let mut fields = row.split_whitespace().skip(1);
    let port = fields.next().and_then(|own| own.rsplit(':').next());
    let state = fields.nth(1);
    state == Some(ESTABLISHED)
        && port.and_then(|port| u16::from_str_radix(port, 16).ok()) == Some(PORT)
}

#[cfg(test)]
mod tests {
    use super::is_accepted;

    #[test]
    fn a_row_of_the_socket_table_is_read() {
        let row = |port: &str, state: &str| {
            format!("  1: 0100007F:{port} 0100007F:D2B6 {state} 00000000:00000000 00:00000000")
        };
        assert!(is_accepted(&row("2E18", "01")));
        assert!(!is_accepted(&row("2E18", "0A")));
        assert!(!is_accepted(&row("0016", "01")));
        assert!(!is_accepted("nothing"));
    }
}
