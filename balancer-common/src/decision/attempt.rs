//! One attempt at one backend.

use crate::decision::admission::Judgement;

/// How one attempt at a backend ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// The SYN is its.
    Assigned,
    /// Another CPU sent a SYN there since the scan: the choice must be made anew.
    Raced,
    /// SYN cookies are in use, which the scan did not know: the choice must be made anew, by four-tuple.
    Cookies,
    /// It was looked at and can't take it.
    Judged(Judgement),
    /// It does not listen any more.
    Gone,
    /// The kernel refused the assignment.
    Failed,
    /// Another `sk_lookup` program has chosen a socket.
    Foreign,
}

impl Attempt {
    /// Packed into one word, for a call between kernel functions, which return no structures.
    #[inline(always)]
    pub const fn encode(self) -> u64 {
        match self {
            Self::Assigned => 0,
            Self::Raced => 1,
            Self::Cookies => 2,
            Self::Gone => 3,
            Self::Failed => 4,
            Self::Foreign => 5,
            Self::Judged(Judgement::OverQuota) => 6,
            Self::Judged(Judgement::QueueFull { since }) => 7 | (since as u64) << 32,
            Self::Judged(Judgement::Take) => 8,
        }
    }

    /// The attempt of a word; an unknown one failed.
    #[inline(always)]
    pub const fn decode(word: u64) -> Self {
        match word as u32 {
            0 => Self::Assigned,
            1 => Self::Raced,
            2 => Self::Cookies,
            3 => Self::Gone,
            5 => Self::Foreign,
            6 => Self::Judged(Judgement::OverQuota),
            7 => Self::Judged(Judgement::QueueFull {
                since: (word >> 32) as u32,
            }),
            8 => Self::Judged(Judgement::Take),
            _ => Self::Failed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_survive_a_word() {
        for attempt in [
            Attempt::Assigned,
            Attempt::Raced,
            Attempt::Cookies,
            Attempt::Gone,
            Attempt::Failed,
            Attempt::Foreign,
            Attempt::Judged(Judgement::OverQuota),
            Attempt::Judged(Judgement::QueueFull { since: 77 }),
            Attempt::Judged(Judgement::Take),
        ] {
            assert_eq!(Attempt::decode(attempt.encode()), attempt);
        }
    }
}
