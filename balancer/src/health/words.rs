//! A state of health in words.

use balancer_common::abi::HealthState;

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
