//! How a look-up ended.

use crate::{Reason, Verdict};

/// How a look-up ended: what the kernel is told, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// What the kernel is told.
    pub verdict: Verdict,
    /// The reason that is counted for the look-up and, for a refusal, told to the daemon.
    pub reason: Reason,
    /// The backend that has it, with [`Verdict::Steer`] alone.
    pub slot: Option<u32>,
}

impl Decision {
    /// The backend has it.
    #[inline(always)]
    pub const fn steer(slot: u32, reason: Reason) -> Self {
        Self {
            verdict: Verdict::Steer,
            reason,
            slot: Some(slot),
        }
    }

    /// The kernel decides.
    #[inline(always)]
    pub const fn pass(reason: Reason) -> Self {
        Self {
            verdict: Verdict::Pass,
            reason,
            slot: None,
        }
    }

    /// Nobody has it.
    #[inline(always)]
    pub const fn refuse(reason: Reason) -> Self {
        Self {
            verdict: Verdict::Refuse,
            reason,
            slot: None,
        }
    }

    /// Where nothing can be worked out, for want of memory: `assigned` is a backend of a virtual
    /// port that took the SYN without being judged. On an own port the kernel finds one.
    #[inline(always)]
    pub const fn unjudged(virtual_port: bool, assigned: Option<u32>) -> Self {
        match assigned {
            Some(slot) => Self::steer(slot, Reason::FailOpenError),
            None if virtual_port => Self::pass(Reason::NoBackend),
            None => Self::pass(Reason::FailOpenError),
        }
    }

    /// Packed into one word, for a call between kernel functions, which return no structures: the
    /// reason, the verdict from bit 8 on, the slot from bit 32 on.
    #[inline(always)]
    pub const fn encode(self) -> u64 {
        let slot = match self.slot {
            Some(slot) => slot,
            None => 0,
        };
        self.reason as u64 | (self.verdict as u64) << 8 | (slot as u64) << 32
    }

    /// The decision of a word; `None`: the word is none's.
    #[inline(always)]
    pub fn decode(word: u64) -> Option<Self> {
        let reason = Reason::from_index(word as u8 as usize)?;
        match (word >> 8) as u8 {
            0 => Some(Self::pass(reason)),
            1 => Some(Self::steer((word >> 32) as u32, reason)),
            2 => Some(Self::refuse(reason)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decisions_survive_a_word() {
        for reason in Reason::ALL {
            for decision in [
                Decision::pass(*reason),
                Decision::steer(1_023, *reason),
                Decision::refuse(*reason),
            ] {
                assert_eq!(Decision::decode(decision.encode()), Some(decision));
            }
        }
        assert_eq!(Decision::decode(u64::MAX), None);
    }
}
