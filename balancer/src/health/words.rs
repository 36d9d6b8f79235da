//! A state of health in words.

use std::fmt;

use balancer_common::abi::HealthState;

/// The state of a backend that does not serve, since when and why; `None`: it serves.
pub fn in_words(state: HealthState, since: impl fmt::Display) -> Option<String> {
    let reason = reason(state)?;
    Some(format!("{} since {since}: {reason}", state.name()))
}

/// Why a backend is in that state; `None`: it serves.
pub const fn reason(state: HealthState) -> Option<&'static str> {
    match state {
        HealthState::Serving => None,
        HealthState::Stalled => Some("connections wait in its accept queue, and it accepts none"),
        HealthState::Hung => Some("it does not read what its connections have received"),
        HealthState::Failing => Some(
            "it ends connections within a second of their beginning, and sends them no more than they sent",
        ),
    }
}
