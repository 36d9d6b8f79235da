//! The decision for one look-up, in two phases: scan the packed numbers, then look at a few sockets
//! in order.

pub mod admission;
pub mod attempt;
pub mod cursor;
pub mod health;
pub mod member;
mod outcome;
pub mod reason;
pub mod request;
pub mod scan;
mod state;
#[cfg(test)]
mod tests;

pub use attempt::Attempt;
pub use outcome::Decision;
pub use state::{BackendAccess, DecisionState, LookupFlags, MAX_ROUNDS, advance};

/// Decides one look-up for a service. The kernel program does the same with `bpf_loop` for the
/// loop, which the verifier follows once instead of for every round.
pub fn decide<A: BackendAccess>(access: &mut A, state: &mut DecisionState) -> Decision {
    if let Some(decision) = state.without_looking() {
        return decision;
    }
    for _ in 0..MAX_ROUNDS {
        if let Some(decision) = advance(access, state) {
            return decision;
        }
    }
    state.out_of_rounds()
}
