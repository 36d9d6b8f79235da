//! Decisions in words.

use std::fmt;
use std::time::Duration;

use super::{Action, Decision, HOLD, SETTLES, Stay, TOO_OLD, UNHEARD, Why};

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let backend = &self.backend;
        match &self.action {
            Action::Shed { cookies, why } => match cookies.len() {
                1 => write!(f, "{backend} sheds a connection: {why}"),
                many => write!(f, "{backend} sheds {many} connections: {why}"),
            },
            Action::Stay(stay) => write!(f, "{backend} sheds nothing: {stay}"),
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Leaves { held, terminating } => {
                let what = if *terminating {
                    "it is ending"
                } else {
                    "it is drained"
                };
                write!(f, "{what} and still holds {held}")
            }
            Self::Connections { held, share } => {
                write!(f, "it holds {held} and its share is {share}")
            }
            Self::Load { load, share, taker } => write!(
                f,
                "its connections receive {}, its share is {}, and {taker} has room",
                Bytes(*load),
                Bytes(*share)
            ),
        }
    }
}

impl fmt::Display for Stay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("`rebalance: off`"),
            Self::Even { held, share } => {
                if held <= share {
                    write!(f, "it has {held}, no more than its share of {share}")
                } else {
                    write!(f, "it has {held} and its share is {share}: even enough")
                }
            }
            Self::NotLongEnough { uneven_for } => write!(
                f,
                "it has held too much for {}, and only what lasts {} is evened out",
                Seconds(*uneven_for),
                Seconds(HOLD)
            ),
            Self::InputsTooOld { backend, age: None } => {
                write!(
                    f,
                    "nothing was heard of {backend} yet: its node may have no daemon"
                )
            }
            Self::InputsTooOld {
                backend,
                age: Some(age),
            } => write!(
                f,
                "what is known of {backend} is {} old, and {} is the most",
                Seconds(*age),
                Seconds(TOO_OLD)
            ),
            Self::Unheard { unheard_for } => write!(
                f,
                "nothing was heard of the other nodes for {}, and {} are the most",
                Seconds(*unheard_for),
                Seconds(UNHEARD)
            ),
            Self::Refused => {
                f.write_str("clients are refused for want of room: those who move might be as well")
            }
            Self::ReadySetChanged { ago } => write!(
                f,
                "the ready backends changed {} ago, and {} are waited for",
                Seconds(*ago),
                Seconds(SETTLES)
            ),
            Self::NobodyTakes => f.write_str(
                "nobody else has room: each is full, stalled, failing, or new and at its limit",
            ),
            Self::NoneMovable { unmovable, cooling } => write!(
                f,
                "none of its connections may be moved: {unmovable} can't be or were told already, \
                 and {cooling} were moved of late"
            ),
            Self::RateLimit => f.write_str("as many were told as may be for now"),
            Self::InVain { pause } => write!(
                f,
                "those who were moved came back to it: nothing is tried for {}",
                Seconds(*pause)
            ),
            Self::Elephant { client, load, gap } => write!(
                f,
                "the connection of {client} receives {}, which is more than the gap of {} to who \
                 would take it: moving it would only move the problem",
                Bytes(*load),
                Bytes(*gap)
            ),
            Self::NoneFits => {
                f.write_str("no connection is of a size that would make it more even")
            }
        }
    }
}

/// A time in whole seconds.
struct Seconds(Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} s", self.0.as_secs())
    }
}

/// Bytes a second.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            few @ ..1_000 => write!(f, "{few} B/s"),
            some @ ..1_000_000 => write!(f, "{}.{} kB/s", some / 1_000, some % 1_000 / 100),
            many => write!(
                f,
                "{}.{} MB/s",
                many / 1_000_000,
                many % 1_000_000 / 100_000
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decisions_are_sentences() {
        let of = |action| {
            let backend = "skywalking/oap-0".to_owned();
            Decision { backend, action }.to_string()
        };
        let shed = |cookies: &[u64], why| Action::Shed {
            cookies: cookies.to_vec(),
            why,
        };
        let (held, share) = (133, 100);
        for (action, expected) in [
            (
                shed(&[1, 2], Why::Connections { held, share }),
                "skywalking/oap-0 sheds 2 connections: it holds 133 and its share is 100",
            ),
            (
                shed(
                    &[1],
                    Why::Leaves {
                        held: 7,
                        terminating: true,
                    },
                ),
                "skywalking/oap-0 sheds a connection: it is ending and still holds 7",
            ),
            (
                shed(
                    &[1],
                    Why::Load {
                        load: 1_490_000,
                        share: 999_900,
                        taker: "b".to_owned(),
                    },
                ),
                "skywalking/oap-0 sheds a connection: its connections receive 1.4 MB/s, its share \
                 is 999.9 kB/s, and b has room",
            ),
            (
                Action::Stay(Stay::ReadySetChanged {
                    ago: Duration::from_millis(7_900),
                }),
                "skywalking/oap-0 sheds nothing: the ready backends changed 7 s ago, and 30 s are \
                 waited for",
            ),
            (
                Action::Stay(Stay::Elephant {
                    client: [10, 0, 0, 7].into(),
                    load: 900,
                    gap: 800,
                }),
                "skywalking/oap-0 sheds nothing: the connection of 10.0.0.7 receives 900 B/s, which \
                 is more than the gap of 800 B/s to who would take it: moving it would only move the \
                 problem",
            ),
        ] {
            assert_eq!(of(action), expected);
        }
    }
}
