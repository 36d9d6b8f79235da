//! What to do next with a connection that is to move: a pure rule. Each way is tried before a less
//! gentle one, and none begins while a call is under way that it would end.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Unmovable;
use crate::sys::socket::Traffic;

/// A pause in which no call begins or ends at this very moment.
const SILENCE: Duration = Duration::from_millis(20);
/// A server that has written nothing for so long is not in the middle of a frame: one that has no
/// processor for a while, between two parts of a frame, is held up for a tenth of that.
const BETWEEN_FRAMES: Duration = Duration::from_secs(1);
/// How long such a pause is waited for before messages are looked at.
const BEFORE_WATCHING: Duration = Duration::from_millis(300);
/// How long messages are looked at without a break: a server that writes more often than
/// [`BETWEEN_FRAMES`] writes twice.
const WATCHED: Duration = Duration::from_secs(2);
/// A client that was told leaves its old connection idle for so long before it is closed.
const IDLE_AFTER_TOLD: Duration = Duration::from_secs(3);
/// A connection of an unknown protocol is idle for so long before it is closed.
const IDLE: Duration = Duration::from_secs(1);
/// How long a server has to close a connection whose client seems to have closed it.
const HANGS_UP_WITHIN: Duration = Duration::from_secs(3);
/// With [`Manner::Close`], calls end after so long.
const BEFORE_CLOSING: Duration = Duration::from_secs(10);
/// A connection that has not gone by then stays.
const PATIENCE: Duration = Duration::from_secs(30);

/// What to do with a connection whose client does not go by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Manner {
    /// It stays.
    #[default]
    Graceful,
    /// It is closed in a pause between two messages, which ends its calls.
    Close,
}

/// What a server speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    /// Nothing was seen of it yet.
    #[default]
    Unknown,
    /// HTTP/2 without TLS: its frames were seen.
    Http2,
    /// Something else: not a byte is ever written into it.
    Other,
}

/// What is known of a connection that is to move.
#[derive(Clone, Copy, Debug)]
pub struct View {
    /// What its server speaks.
    pub protocol: Protocol,
    /// What to do where the client does not go.
    pub manner: Manner,
    /// How long ago its move was ordered.
    pub ordered: Duration,
    /// How long its messages have been looked at; `None`: they are not.
    pub watched: Option<Duration>,
    /// How long they have not been looked at.
    pub unwatched: Duration,
    /// Its messages were looked at before.
    pub was_watched: bool,
    /// How long ago the client was told to move.
    pub told: Option<Duration>,
    /// How long ago the server was made to believe that the client has closed.
    pub hung_up: Option<Duration>,
    /// What it has done lately.
    pub traffic: Traffic,
}

/// What to do with a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing yet.
    Wait,
    /// Look at its server's messages; `tell`: and write a GOAWAY between two of them.
    Watch {
        /// Write a GOAWAY.
        tell: bool,
    },
    /// Look at its messages no more.
    Unwatch,
    /// Write a GOAWAY now.
    Tell,
    /// Make the server believe that the client has closed, so that it closes, too.
    HangUp,
    /// End it.
    Close,
    /// Leave it where it is.
    GiveUp(Unmovable),
}

/// What to do next with a connection.
pub fn next_step(view: &View) -> Step {
    if let Some(since) = view.hung_up {
        return if since < HANGS_UP_WITHIN {
            Step::Wait
        } else {
            Step::Close
        };
    }
    if let Some(since) = view.watched {
        return if since < WATCHED {
            Step::Wait
        } else {
            Step::Unwatch
        };
    }
    if let Some(since) = view.told {
        return after_told(view, since);
    }
    match view.protocol {
        Protocol::Http2 => tell(view),
        Protocol::Unknown if !view.was_watched => Step::Watch { tell: false },
        Protocol::Unknown | Protocol::Other => hang_up(view),
    }
}

fn tell(view: &View) -> Step {
    if view.is_between_frames() && view.is_silent(SILENCE) {
        return Step::Tell;
    }
    if view.ordered >= PATIENCE {
        return Step::GiveUp(Unmovable::NeverSilent);
    }
    if view.unwatched < BEFORE_WATCHING {
        return Step::Wait;
    }
    Step::Watch { tell: true }
}

/// Some clients leave the connection open and idle, and some go on with calls that never end.
fn after_told(view: &View, since: Duration) -> Step {
    if since >= IDLE_AFTER_TOLD && view.is_silent(IDLE_AFTER_TOLD) {
        return Step::Close;
    }
    if view.manner == Manner::Close && since >= BEFORE_CLOSING && view.is_silent(SILENCE) {
        return Step::Close;
    }
    give_up_in_time(since, Unmovable::KeepsCalls)
}

/// A request that is under way can't be told from silence, but for who spoke last.
fn hang_up(view: &View) -> Step {
    let traffic = &view.traffic;
    let answered = traffic.sent_ms_ago <= traffic.received_ms_ago;
    if answered && view.is_silent(IDLE) {
        return Step::HangUp;
    }
    if view.manner == Manner::Close && view.ordered >= BEFORE_CLOSING && view.is_silent(SILENCE) {
        return Step::HangUp;
    }
    give_up_in_time(view.ordered, Unmovable::NeverSilent)
}

fn give_up_in_time(since: Duration, why: Unmovable) -> Step {
    if since < PATIENCE {
        Step::Wait
    } else {
        Step::GiveUp(why)
    }
}

impl View {
    /// The server is not in the middle of a frame.
    fn is_between_frames(&self) -> bool {
        Duration::from_millis(self.traffic.sent_ms_ago.into()) >= BETWEEN_FRAMES
    }

    /// Nothing came or went for a while, and nothing waits.
    fn is_silent(&self, silence: Duration) -> bool {
        let Traffic {
            sent_ms_ago,
            received_ms_ago,
            unsent,
            unread,
            ..
        } = self.traffic;
        let latest = Duration::from_millis(sent_ms_ago.min(received_ms_ago).into());
        latest >= silence && unsent == 0 && unread == 0
    }
}

impl Step {
    /// It closes the connection: only done where it is still right a moment later.
    pub const fn is_final(&self) -> bool {
        matches!(self, Self::HangUp | Self::Close)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SILENT: Traffic = Traffic {
        established: true,
        sent_ms_ago: 60_000,
        received_ms_ago: 60_001,
        unsent: 0,
        unread: 0,
    };
    const BUSY: Traffic = Traffic {
        sent_ms_ago: 0,
        received_ms_ago: 1,
        ..SILENT
    };

    fn view(protocol: Protocol, traffic: Traffic) -> View {
        View {
            protocol,
            manner: Manner::Graceful,
            ordered: Duration::ZERO,
            watched: None,
            unwatched: Duration::ZERO,
            was_watched: false,
            told: None,
            hung_up: None,
            traffic,
        }
    }

    const fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn silent_http2_is_told_at_once_and_closed_when_it_stays_idle() {
        let mut view = view(Protocol::Http2, SILENT);
        assert_eq!(next_step(&view), Step::Tell);
        view.told = Some(seconds(2));
        assert_eq!(next_step(&view), Step::Wait);
        view.told = Some(seconds(3));
        assert_eq!(next_step(&view), Step::Close);
        // It was told 3 s ago and has had an answer since.
        view.traffic.sent_ms_ago = 2_900;
        assert_eq!(next_step(&view), Step::Wait);
    }

    /// A server may be held up between two parts of a frame.
    #[test]
    fn a_short_pause_is_not_between_frames() {
        let pausing = Traffic {
            sent_ms_ago: 900,
            received_ms_ago: 900,
            ..SILENT
        };
        let mut view = view(Protocol::Http2, pausing);
        assert_eq!(next_step(&view), Step::Wait);
        view.traffic.sent_ms_ago = 1_000;
        assert_eq!(next_step(&view), Step::Tell);
        view.traffic.received_ms_ago = 19;
        assert_eq!(next_step(&view), Step::Wait, "a call begins");
    }

    #[test]
    fn busy_http2_is_told_between_messages() {
        let mut view = view(Protocol::Http2, BUSY);
        assert_eq!(next_step(&view), Step::Wait);
        view.unwatched = Duration::from_millis(300);
        assert_eq!(next_step(&view), Step::Watch { tell: true });
        view.watched = Some(Duration::from_millis(1_999));
        assert_eq!(next_step(&view), Step::Wait);
        view.watched = Some(seconds(2));
        assert_eq!(next_step(&view), Step::Unwatch);
        view.watched = None;
        view.ordered = PATIENCE;
        assert_eq!(next_step(&view), Step::GiveUp(Unmovable::NeverSilent));
    }

    #[test]
    fn a_call_that_never_ends_is_ended_where_that_is_asked_for() {
        let mut view = View {
            told: Some(seconds(10)),
            ..view(Protocol::Http2, BUSY)
        };
        assert_eq!(next_step(&view), Step::Wait);
        view.traffic.sent_ms_ago = 25;
        view.traffic.received_ms_ago = 25;
        assert_eq!(next_step(&view), Step::Wait, "gentle");
        view.manner = Manner::Close;
        assert_eq!(next_step(&view), Step::Close);
        view.manner = Manner::Graceful;
        view.told = Some(PATIENCE);
        assert_eq!(next_step(&view), Step::GiveUp(Unmovable::KeepsCalls));
    }

    #[test]
    fn an_unknown_protocol_is_looked_at_first_and_hung_up_when_the_server_spoke_last() {
        let mut view = view(Protocol::Unknown, SILENT);
        assert_eq!(next_step(&view), Step::Watch { tell: false });
        view.was_watched = true;
        assert_eq!(next_step(&view), Step::HangUp);
        view.traffic.received_ms_ago = view.traffic.sent_ms_ago - 1;
        assert_eq!(next_step(&view), Step::Wait, "a request is under way");
        view.hung_up = Some(seconds(2));
        assert_eq!(next_step(&view), Step::Wait);
        view.hung_up = Some(seconds(3));
        assert_eq!(next_step(&view), Step::Close);
    }

    prop_compose! {
        fn traffics()(
            sent_ms_ago in 0_u32..5_000,
            received_ms_ago in 0_u32..5_000,
            unsent in 0_u32..3,
            unread in 0_u64..3,
        ) -> Traffic {
            Traffic { established: true, sent_ms_ago, received_ms_ago, unsent, unread }
        }
    }

    fn times() -> impl Strategy<Value = Option<Duration>> {
        prop::option::of((0_u64..60_000).prop_map(Duration::from_millis))
    }

    prop_compose! {
        fn views()(
            protocol in prop::sample::select(vec![Protocol::Unknown, Protocol::Http2, Protocol::Other]),
            close: bool,
            ordered in 0_u64..60_000,
            watched in times(),
            unwatched in 0_u64..2_000,
            was_watched: bool,
            told in times(),
            traffic in traffics(),
        ) -> View {
            View {
                protocol,
                manner: if close { Manner::Close } else { Manner::Graceful },
                ordered: Duration::from_millis(ordered),
                watched,
                unwatched: Duration::from_millis(unwatched),
                was_watched,
                told,
                hung_up: None,
                traffic,
            }
        }
    }

    proptest! {
        /// Not a byte is written into what is not known to be HTTP/2, nor twice.
        #[test]
        fn only_http2_is_told_and_once(view in views()) {
            if matches!(next_step(&view), Step::Tell | Step::Watch { tell: true }) {
                prop_assert_eq!(view.protocol, Protocol::Http2);
                prop_assert!(view.told.is_none() && view.watched.is_none());
            }
        }

        /// Nothing is written or closed while bytes are on their way.
        #[test]
        fn nothing_is_done_to_a_connection_that_is_not_silent(view in views()) {
            let step = next_step(&view);
            if step.is_final() || step == Step::Tell {
                prop_assert!(view.is_silent(SILENCE));
            }
            prop_assert!(step != Step::Tell || view.is_between_frames());
            if step.is_final() && view.manner == Manner::Graceful {
                prop_assert!(view.is_silent(IDLE));
            }
        }

        /// Every move ends.
        #[test]
        fn after_a_while_nothing_is_waited_for(view in views()) {
            let late = View {
                ordered: seconds(60),
                watched: None,
                told: view.told.map(|_| seconds(60)),
                was_watched: true,
                manner: Manner::Graceful,
                ..view
            };
            prop_assert_ne!(next_step(&late), Step::Wait);
        }
    }
}
