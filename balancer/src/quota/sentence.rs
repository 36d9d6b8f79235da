//! The sentence about computed quotas: the formula with its numbers, then what moved the result.

use std::fmt;

use super::model::{Amount, Demand, ReadyBackend};
use super::share::{Shares, sum};

/// The most bytes of a sentence.
const MAX_SENTENCE: usize = 255;
/// What stands where something was cut.
const MORE: &str = "…";

/// How the parts of a demand come about, between words of the caller's; the words of the demand
/// become as short as they must.
pub(super) fn sentence(
    start: &str,
    demand: &Demand,
    backends: &[ReadyBackend],
    shares: &Shares,
    end: &str,
) -> String {
    let rest = formula(demand, backends, shares) + &what_moved_it(demand, backends, shares) + end;
    let whole = match demand.amount {
        Amount::Clients { clients, each } => {
            format!("{start}ceil({clients} clients × {each}{rest}")
        }
        Amount::Connections { connections, words } => {
            let before = format!("{start}ceil({} (", Connections(connections));
            let fits = MAX_SENTENCE.saturating_sub(before.len() + ")".len() + rest.len());
            format!("{before}{}){rest}", shortened(words, fits))
        }
    };
    if whole.len() <= MAX_SENTENCE {
        return whole;
    }
    format!("{}{MORE}", first(&whole, MAX_SENTENCE - MORE.len()))
}

/// The formula behind its total, and its result.
fn formula(demand: &Demand, backends: &[ReadyBackend], shares: &Shares) -> String {
    let factor = match demand.headroom_percent {
        0 => String::new(),
        percent => format!(" × {}", Factor(percent)),
    };
    let ready = backends.len();
    let weights = || backends.iter().map(|backend| u64::from(backend.weight));
    let (sum, largest) = (weights().sum::<u64>(), weights().max().unwrap_or(0));
    let divided = if weights().all(|weight| weight == largest) {
        if demand.placed && ready > 1 {
            format!(" / ({ready} ready - 1))")
        } else {
            format!(" / {ready} ready)")
        }
    } else if demand.placed && largest < sum {
        format!(" × weight / ({sum} - {largest}), {ready} ready)")
    } else {
        format!(" × weight / {sum}, {ready} ready)")
    };
    format!("{factor}{divided} = {}", Spread(&shares.formula))
}

/// What makes the targets differ from the formula.
fn what_moved_it(demand: &Demand, backends: &[ReadyBackend], shares: &Shares) -> String {
    let mut words = Vec::new();
    let min_quota = demand.min_quota;
    if shares.formula.iter().any(|part| *part < min_quota) {
        words.push(format!("; at least min_quota {min_quota}"));
    }
    let unheld: Vec<u32> = shares
        .formula
        .iter()
        .map(|part| (*part).max(min_quota))
        .collect();
    let established = demand.established(backends);
    if sum(&unheld) < established {
        let held = Spread(&shares.held);
        words.push(format!(
            "; held at {held} because {established} are established"
        ));
        if demand.elsewhere > 0 {
            let elsewhere = match demand.unhealthy {
                0 => "not ready",
                _ => "not ready or unhealthy",
            };
            words.push(format!(" ({} on backends {elsewhere})", demand.elsewhere));
        }
    }
    if demand.unhealthy > 0 {
        let unhealthy = demand.unhealthy;
        words.push(format!("; {unhealthy} unhealthy without a share"));
    }
    if demand.extra > 0 {
        let extra = demand.extra;
        words.push(format!(
            "; every other has room for {extra} more: at least so many clients were refused for long"
        ));
    }
    words.concat()
}

/// The first summands of `words` that fit into so many bytes, or of the first one what fits.
fn shortened(words: &str, bytes: usize) -> String {
    const PLUS: &str = " + ";
    if words.len() <= bytes {
        return words.to_owned();
    }
    let room = bytes.saturating_sub(MORE.len());
    let summands = words
        .match_indices(PLUS)
        .map(|(at, _)| at + PLUS.len())
        .take_while(|end| *end <= room)
        .last();
    let kept = summands.map_or_else(|| first(words, room), |end| &words[..end]);
    format!("{kept}{MORE}")
}

/// The characters that end within so many bytes.
fn first(text: &str, bytes: usize) -> &str {
    let mut ends = (0..=bytes.min(text.len())).rev();
    let end = ends.find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or_default()]
}

/// A number of connections.
pub(super) struct Connections(pub(super) u64);

impl fmt::Display for Connections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.0 == 1 { "" } else { "s" };
        write!(f, "{} connection{plural}", self.0)
    }
}

/// 1 + this many percent, as short as it is exact.
struct Factor(u32);

impl fmt::Display for Factor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hundredths = 100 + u64::from(self.0);
        let (whole, rest) = (hundredths / 100, hundredths % 100);
        match (rest, rest % 10) {
            (0, _) => write!(f, "{whole}"),
            (_, 0) => write!(f, "{whole}.{}", rest / 10),
            _ => write!(f, "{whole}.{rest:02}"),
        }
    }
}

/// Numbers that are mostly equal: the one, or the smallest and the largest.
pub(super) struct Spread<'a>(pub(super) &'a [u32]);

impl fmt::Display for Spread<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let least = self.0.iter().min().copied().unwrap_or_default();
        let most = self.0.iter().max().copied().unwrap_or_default();
        if least == most {
            write!(f, "{least}")
        } else {
            write!(f, "{least} to {most}")
        }
    }
}
