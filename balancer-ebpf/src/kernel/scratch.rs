//! Memory for the state of a decision: on the stack the verifier would follow every value in it.

use balancer_common::decision::DecisionState;
use core::ptr::{read_volatile, write_volatile};

use crate::maps::{SCRATCH, SCRATCH_DEPTH};

/// A place for the state of one decision, of the CPU's few. A look-up by a process (of a
/// socket-destroying tool, of another program) can be interrupted by a SYN on the same CPU: each
/// takes the next place and gives it back.
pub struct Scratch<'a> {
    pub state: &'a mut DecisionState,
    taken: *mut u64,
}

impl Scratch<'_> {
    /// Takes the next place; `None` where all of the CPU's are taken.
    #[inline(always)]
    pub fn take() -> Option<Self> {
        let taken = SCRATCH_DEPTH.get_ptr_mut(0)?;
        // SAFETY: the element is that of this CPU. Volatile, because what interrupts the program
        // changes it.
        let level = unsafe { read_volatile(taken) };
        let state = SCRATCH.get_ptr_mut(level as u32)?;
        // SAFETY: the element is that of this CPU. Volatile, because what interrupts the program
        // changes it.
        unsafe { write_volatile(taken, level + 1) };
        Some(Self {
            // SAFETY: the place was taken: nobody else uses it. Zeros, with which the map begins,
            // are a valid state.
            state: unsafe { (*state).assume_init_mut() },
            taken,
        })
    }
}

impl Drop for Scratch<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: the element is that of this CPU. Volatile, because what interrupts the program
        // changes it.
        let level = unsafe { read_volatile(self.taken) };
        // SAFETY: the element is that of this CPU. Volatile, because what interrupts the program
        // changes it.
        unsafe { write_volatile(self.taken, level.saturating_sub(1)) };
    }
}
