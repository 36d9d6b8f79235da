//! Connections through a virtual port that nobody counts, and why.

use std::collections::{BTreeMap, BTreeSet};

use crate::discover::process_name;

/// How many processes a reason names.
const NAMED: usize = 3;

/// Why it is not known whose a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Why {
    /// Its processes hold several listeners that it may have come from.
    Several,
    /// Its processes hold no listener that it may have come from.
    NoListener,
    /// No process has it that we may look into.
    Hidden,
    /// It waits to be accepted: no process has it.
    Unaccepted,
}

impl Why {
    const fn words(self) -> &'static str {
        match self {
            Self::Several => "held by a process with several of its backends",
            Self::NoListener => "held by a process with none of its backends",
            Self::Hidden => "held by no process that can be looked into",
            Self::Unaccepted => "not accepted yet",
        }
    }
}

/// The connections through the virtual port of one service that nobody counts.
#[derive(Clone, Debug, Default)]
pub struct Unattributed(BTreeMap<Why, Part>);

/// Those for one reason.
#[derive(Clone, Debug, Default)]
struct Part {
    connections: u32,
    pids: BTreeSet<u32>,
}

impl Unattributed {
    /// Adds a connection; `pid` is a process that holds it.
    pub fn add(&mut self, why: Why, pid: Option<u32>) {
        let part = self.0.entry(why).or_default();
        part.connections += 1;
        part.pids.extend(pid);
    }

    /// How many connections they are.
    pub fn total(&self) -> u32 {
        self.0.values().map(|part| part.connections).sum()
    }

    /// How many there are for which reason, with some of the processes.
    pub fn reasons(&self) -> String {
        let reasons = self.0.iter().map(|(why, part)| {
            let names = part.pids.iter().take(NAMED).map(|pid| process_name(*pid));
            let names: Vec<_> = names.collect();
            let names = match names.as_slice() {
                [] => String::new(),
                names => format!(" ({})", names.join(", ")),
            };
            format!("{} {}{names}", part.connections, why.words())
        });
        reasons.collect::<Vec<_>>().join("; ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_its_number_and_its_processes() {
        let mut found = Unattributed::default();
        assert_eq!((found.total(), found.reasons()), (0, String::new()));
        for pid in (0..5).map(|n| u32::MAX - n) {
            found.add(Why::Several, Some(pid));
            found.add(Why::Several, Some(pid));
        }
        found.add(Why::Unaccepted, None);
        assert_eq!(found.total(), 11);
        let named = (0..3).map(|n| format!("process {}", u32::MAX - 4 + n));
        let named: Vec<_> = named.collect();
        assert_eq!(
            found.reasons(),
            format!(
                "10 held by a process with several of its backends ({}); 1 not accepted yet",
                named.join(", ")
            )
        );
    }
}
