//! Candidates that belong to nobody.

use super::backend::SlotState;

/// Value of DISOWNED: which backend of a slot the daemon has found to belong to nobody. Connections
/// that it accepts from then on get no socket storage, and the kernel half does not count them.
/// Should it be confirmed later, the word stays: the daemon counts these.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Disowned {
    /// The generation of the backend + 1; 0: none yet. Atomic.
    pub generation: u64,
}

impl Disowned {
    /// The word for the backend that a slot has now.
    pub const fn new(slot_state: SlotState) -> Self {
        Self {
            generation: slot_state.generation() as u64 + 1,
        }
    }

    /// Whether it is the backend that the slot has now.
    #[inline(always)]
    pub const fn is_for(self, slot_state: SlotState) -> bool {
        self.generation == slot_state.generation() as u64 + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::BackendState;

    #[test]
    fn the_next_backend_of_a_slot_is_another() {
        let of = |generation| SlotState::new(generation, BackendState::Active);
        for generation in [0, 1, u32::MAX - 1, u32::MAX] {
            let word = Disowned::new(of(generation));
            assert!(word.is_for(of(generation)));
            assert!(word.is_for(of(generation).with(BackendState::Closed)));
            assert!(!word.is_for(of(generation.wrapping_add(1))));
            assert!(!Disowned::default().is_for(of(generation)));
        }
    }
}
