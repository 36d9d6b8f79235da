//! The sentence about computed quotas: the formula with its numbers, then what moved the result.

use std::fmt;

use super::{
    Ready,
    share::{Demand, Shares},
};

/// The most bytes of a sentence.
pub(super) const MAX_SENTENCE: usize = 255;

/// What is shared out.
#[derive(Clone, Copy)]
pub(super) enum What<'a> {
    /// So many clients, each with so many connections.
    Clients { clients: u32, each: u32 },
    /// So many connections, and in words how that comes about.
    Connections { connections: u64, words: &'a str },
}

impl What<'_> {
    pub(super) fn connections(&self) -> u64 {
        match *self {
            Self::Clients { clients, each } => u64::from(clients) * u64::from(each),
            Self::Connections { connections, .. } => connections,
        }
    }
}

impl fmt::Display for What<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Clients { clients, each } => write!(f, "{clients} clients × {each}"),
            Self::Connections { connections, words } => {
                write!(f, "{} ({words})", Connections(*connections))
            }
        }
    }
}

/// A number of connections.
pub(super) struct Connections(pub(super) u64);

impl fmt::Display for Connections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.0 == 1 { "" } else { "s" };
        write!(f, "{} connection{plural}", self.0)
    }
}

/// What explains computed quotas.
#[derive(Clone, Copy)]
pub(super) struct Explained<'a> {
    pub(super) demand: &'a Demand<'a>,
    pub(super) backends: &'a [Ready],
    pub(super) shares: &'a Shares,
    /// With slow lowering.
    pub(super) quotas: &'a [u32],
}

impl Explained<'_> {
    /// The sentence; the words of the demand become as short as they must.
    pub(super) fn sentence(&self) -> String {
        self.between("", "")
    }

    /// The same between words of the caller's.
    pub(super) fn between(&self, start: &str, end: &str) -> String {
        shortest_words(self.demand, |demand| {
            let explained = Explained { demand, ..*self };
            format!("{start}{explained}{end}")
        })
    }

    /// The formula with its numbers and its result.
    fn formula(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Demand {
            what,
            headroom_percent,
            ..
        } = self.demand;
        write!(f, "ceil({what}")?;
        if *headroom_percent > 0 {
            write!(f, " × {}", Factor(*headroom_percent))?;
        }
        let ready = self.backends.len();
        let weight = self.backends[0].weight;
        if self.backends.iter().all(|backend| backend.weight == weight) {
            write!(f, " / {ready} ready)")?;
        } else {
            let sum: u64 = self
                .backends
                .iter()
                .map(|backend| u64::from(backend.weight))
                .sum();
            write!(f, " × weight / {sum}, {ready} ready)")?;
        }
        write!(f, " = {}", Spread(&self.shares.formula))
    }

    /// What makes the targets differ from the formula.
    fn targets(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shares { formula, held, .. } = self.shares;
        let Demand {
            min_quota,
            elsewhere,
            more,
            ..
        } = self.demand;
        if formula.iter().any(|share| share < min_quota) {
            write!(f, "; at least min_quota {min_quota}")?;
        }
        let unheld: u64 = formula
            .iter()
            .map(|share| u64::from(*share.max(min_quota)))
            .sum();
        let established = self.demand.established(self.backends);
        if unheld < established {
            let held = Spread(held);
            write!(f, "; held at {held} because {established} are established")?;
            if *elsewhere > 0 {
                write!(f, " ({elsewhere} on backends not ready)")?;
            }
        }
        if *more > 0 {
            write!(f, "; {more} more each for as many sources refused for long")?;
        }
        Ok(())
    }
}

impl fmt::Display for Explained<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.formula(f)?;
        self.targets(f)?;
        if self.quotas != self.shares.targets {
            write!(
                f,
                "; lowered by at most 10 % a minute: {} now",
                Spread(self.quotas)
            )?;
        }
        Ok(())
    }
}

/// What `sentence` makes of `demand`, whose words are cut so that it is not too long: what stands behind them says what came of it.
fn shortest_words(demand: &Demand, sentence: impl Fn(&Demand) -> String) -> String {
    let whole = sentence(demand);
    let What::Connections { connections, words } = demand.what else {
        return cut(whole);
    };
    let Some(excess) = whole.len().checked_sub(MAX_SENTENCE + 1) else {
        return whole;
    };
    let fits = words.len().saturating_sub(excess + 1);
    cut(sentence(&Demand {
        what: What::Connections {
            connections,
            words: &shortened(words, fits),
        },
        ..*demand
    }))
}

/// The first summands of `words` that fit into so many bytes, or of the first one what fits.
fn shortened(words: &str, bytes: usize) -> String {
    const PLUS: &str = " + ";
    const MORE: &str = "…";
    let summands = words
        .match_indices(PLUS)
        .map(|(at, _)| at + PLUS.len())
        .take_while(|end| end + MORE.len() <= bytes)
        .last();
    let end = summands.unwrap_or_else(|| boundary(words, bytes.saturating_sub(MORE.len())));
    format!("{}{MORE}", &words[..end])
}

/// `sentence` in as many bytes as one may have.
fn cut(mut sentence: String) -> String {
    const MORE: &str = "…";
    if sentence.len() > MAX_SENTENCE {
        sentence.truncate(boundary(&sentence, MAX_SENTENCE - MORE.len()));
        sentence.push_str(MORE);
    }
    sentence
}

/// Where the last character ends that ends within so many bytes.
fn boundary(text: &str, bytes: usize) -> usize {
    (0..=bytes.min(text.len()))
        .rev()
        .find(|at| text.is_char_boundary(*at))
        .unwrap_or_default()
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

/// Numbers that are mostly the same: the one, or the smallest and the largest.
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
