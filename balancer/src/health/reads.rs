//! Whether a backend reads what its clients send.

use std::collections::HashMap;

use balancer_common::abi::ticks_of_ms;

/// A backend hangs when it has read nothing for so long: 3 s, less what a look may come too early.
/// Healthy servers under load were seen to leave bytes unread for 82 ms at the most.
const HUNG_AFTER: u64 = ticks_of_ms(2_900);
/// Without unread bytes a backend counts as hanging for so long: its clients have given it up, and
/// nothing but new ones can show that it reads again.
const HELD_FOR: u64 = ticks_of_ms(10_000);

/// What the socket table shows of an established connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// The socket's cookie.
    pub cookie: u64,
    /// Bytes that the client has sent, ever.
    pub received: u64,
    /// Those of them that the backend has not read.
    pub unread: u32,
    /// How long ago the last ones came, in milliseconds.
    pub ms_ago: u32,
}

impl Reading {
    const fn read(&self) -> u64 {
        self.received.saturating_sub(self.unread as u64)
    }
}

/// What one look after the other has shown of a backend's connections. Times are ticks.
///
/// A backend hangs where at least half of the connections that have sent something have unread
/// bytes, and nothing was read on any of its connections, from one look to another at least 3 s
/// later. So a server that leaves one connection alone does not hang for as long as it reads
/// others, nor does one whose clients are silent.
#[derive(Clone, Debug, Default)]
pub struct ReadWatch {
    /// When it was looked at last.
    looked: Option<u64>,
    /// What was read of the connections that had unread bytes then, by cookie.
    unread: HashMap<u64, u64>,
    /// Since when nothing is read.
    silence: Option<Silence>,
}

/// A time in which a backend reads nothing of what there is to be read.
#[derive(Clone, Copy, Debug)]
struct Silence {
    since: u64,
    /// When enough connections had unread bytes last.
    seen: u64,
}

impl ReadWatch {
    /// Takes in what there is at one moment; since when the backend hangs, if it does.
    pub fn look(&mut self, now: u64, readings: impl Iterator<Item = Reading>) -> Option<u64> {
        let before = self.looked.replace(now);
        let before_ms = before.map_or(0, |before| ms(now.saturating_sub(before)));
        let (mut senders, mut was_read) = (0, false);
        let mut unread = HashMap::new();
        for reading in readings.filter(|reading| reading.received > 0) {
            senders += 1;
            let known = self.unread.get(&reading.cookie);
            was_read |= known.is_some_and(|known| reading.read() > *known);
            if reading.unread > 0 {
                unread.insert(reading.cookie, reading.read());
            } else {
                was_read |= u64::from(reading.ms_ago) < before_ms;
            }
        }
        let is_half = 2 * unread.len() >= senders;
        let waits = !unread.is_empty();
        self.unread = unread;
        self.silence = self.silence.filter(|silence| {
            let is_held = !waits && now.saturating_sub(silence.seen) < HELD_FOR;
            !was_read && (is_held || waits && is_half)
        });
        if waits && is_half {
            let silence = self.silence.get_or_insert(Silence {
                since: now,
                seen: now,
            });
            silence.seen = now;
        }
        self.silence
            .filter(|silence| silence.seen.saturating_sub(silence.since) >= HUNG_AFTER)
            .map(|silence| silence.since.min(now))
    }
}

/// A time in ticks, in milliseconds.
const fn ms(ticks: u64) -> u64 {
    (ticks << 20) / 1_000_000
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    /// The server of a simulation, and its clients. Times are in milliseconds.
    struct Server {
        clients: Vec<Client>,
        /// Cookies given away.
        cookies: u64,
    }

    #[derive(Clone, Debug, Default)]
    struct Client {
        cookie: u64,
        received: u64,
        read: u64,
        /// When bytes came that have not been read.
        unread: VecDeque<u64>,
        last: u64,
        /// The server never reads it.
        left_alone: bool,
    }

    impl Server {
        fn with(clients: u64) -> Self {
            let mut server = Self {
                clients: Vec::new(),
                cookies: 0,
            };
            for _ in 0..clients {
                server.join();
            }
            server
        }

        fn join(&mut self) {
            self.cookies += 1;
            self.clients.push(Client {
                cookie: self.cookies,
                ..Client::default()
            });
        }

        fn send(&mut self, client: usize, now: u64) {
            let client = &mut self.clients[client];
            client.received += 100;
            client.last = now;
            client.unread.push_back(now);
        }

        /// Reads what has waited for so long.
        fn read(&mut self, now: u64, waited: u64) {
            for client in self.clients.iter_mut().filter(|client| !client.left_alone) {
                while client
                    .unread
                    .front()
                    .is_some_and(|came| came + waited <= now)
                {
                    client.unread.pop_front();
                    client.read += 100;
                }
            }
        }

        fn readings(&self, now: u64) -> impl Iterator<Item = Reading> {
            self.clients.iter().map(move |client| Reading {
                cookie: client.cookie,
                received: client.received,
                unread: u32::try_from(client.received - client.read).expect("few"),
                ms_ago: u32::try_from(now - client.last).expect("short"),
            })
        }
    }

    /// Looks once a second, at `phase` ms of it, while `step` plays each millisecond; the times at
    /// which the server was seen to hang.
    fn play(
        server: &mut Server,
        phase: u64,
        end: u64,
        mut step: impl FnMut(&mut Server, u64),
    ) -> Vec<u64> {
        let mut watch = ReadWatch::default();
        let mut hung = Vec::new();
        // The clock has run for a while: tick 0 is no time.
        let ticks = |now: u64| balancer_common::abi::ticks((now + 1_000_000) * 1_000_000);
        for now in 0..end {
            step(server, now);
            if now % 1_000 == phase && watch.look(ticks(now), server.readings(now)).is_some() {
                hung.push(now);
            }
        }
        hung
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// However often clients send, and some are silent: a server that reads within 82 ms.
        #[test]
        fn a_server_under_load_does_not_hang(phase in 0..1_000_u64, clients in 1..9_u64, every in 20..9_000_u64) {
            let mut server = Server::with(clients);
            let hung = play(&mut server, phase, 40_000, |server, now| {
                let chosen = usize::try_from(now / every % (clients + 1)).expect("few");
                if now % every == 0 && chosen < server.clients.len() {
                    server.send(chosen, now);
                }
                server.read(now, 82);
            });
            prop_assert_eq!(hung, [0; 0]);
        }

        /// It is seen within 5 s of the next byte that comes.
        #[test]
        fn a_server_that_is_stopped_hangs_until_it_reads(phase in 0..1_000_u64, clients in 1..9_u64, every in 20..1_000_u64) {
            let mut server = Server::with(clients);
            let all = usize::try_from(clients).expect("few");
            let hung = play(&mut server, phase, 40_000, |server, now| {
                if now % every == 0 {
                    (0..all).for_each(|client| server.send(client, now));
                }
                if !(10_000..25_000).contains(&now) {
                    server.read(now, 1);
                }
            });
            let (first, last) = (hung.first().copied(), hung.last().copied());
            prop_assert!(first.is_some_and(|first| (13_000 - 100..=15_000).contains(&first)), "{hung:?}");
            prop_assert!(last.is_some_and(|last| (24_000..25_000).contains(&last)), "{hung:?}");
        }

        #[test]
        fn a_pause_of_less_than_three_seconds_is_none(phase in 0..1_000_u64, pause in 0..2_900_u64) {
            let mut server = Server::with(4);
            let hung = play(&mut server, phase, 60_000, |server, now| {
                if now % 10 == 0 {
                    (0..4).for_each(|client| server.send(client, now));
                }
                if now % 20_000 >= pause {
                    server.read(now, 1);
                }
            });
            prop_assert_eq!(hung, [0; 0]);
        }

        /// Whatever the table says and however the clock goes, nothing overflows.
        #[test]
        fn no_reading_makes_it_panic(looks in prop::collection::vec((any::<u64>(), prop::collection::vec((0..4_u64, any::<u64>(), any::<u32>(), any::<u32>()), 0..6)), 0..9)) {
            let mut watch = ReadWatch::default();
            for (now, readings) in looks {
                let readings = readings.into_iter().map(|(cookie, received, unread, ms_ago)| Reading { cookie, received, unread, ms_ago });
                let since = watch.look(now >> 20, readings);
                prop_assert!(since.is_none_or(|since| since <= now >> 20));
            }
        }
    }

    #[test]
    fn one_connection_that_is_left_alone_is_no_hang_while_others_are_read() {
        let mut server = Server::with(2);
        server.clients[0].left_alone = true;
        let hung = play(&mut server, 500, 60_000, |server, now| {
            if now % 2_000 == 0 {
                server.send(0, now);
                server.send(1, now);
            }
            server.read(now, 82);
        });
        assert_eq!(hung, [0; 0]);
    }

    /// The others have been read once, and are silent since.
    #[test]
    fn one_connection_of_three_that_is_left_alone_is_no_hang() {
        let mut server = Server::with(3);
        let hung = play(&mut server, 500, 60_000, |server, now| {
            match now {
                1_000 => (0..3).for_each(|client| server.send(client, now)),
                5_000 => {
                    server.clients[0].left_alone = true;
                    server.send(0, now);
                }
                // Unread for a moment, when it is looked at: two of three.
                30_480 => server.send(1, now),
                _ => {}
            }
            server.read(now, 40);
        });
        assert_eq!(hung, [0; 0]);
    }

    #[test]
    fn a_server_whose_clients_are_silent_does_not_hang() {
        let mut server = Server::with(3);
        let hung = play(&mut server, 0, 60_000, |server, now| {
            if now == 500 {
                (0..3).for_each(|client| server.send(client, now));
            }
            server.read(now, 10);
        });
        assert_eq!(hung, [0; 0]);
    }

    /// A request after a long silence, seen before it is read.
    #[test]
    fn a_request_that_is_just_coming_in_is_no_hang() {
        let mut server = Server::with(3);
        let hung = play(&mut server, 0, 60_000, |server, now| {
            if now == 39_990 {
                server.send(0, now);
            }
            server.read(now, 80);
        });
        assert_eq!(hung, [0; 0]);
    }

    /// Its clients wait for an answer for a second, and come back after another one.
    #[test]
    fn a_server_that_accepts_and_never_reads_hangs_while_clients_come() {
        let mut server = Server::with(0);
        let hung = play(&mut server, 300, 40_000, |server, now| {
            if now >= 30_000 {
                server.clients.clear();
            } else if now % 2_000 == 0 {
                (0..5).for_each(|_| server.join());
                (0..5).for_each(|client| server.send(client, now));
            } else if now % 2_000 == 1_000 {
                server.clients.clear();
            }
        });
        assert_eq!(hung.first(), Some(&4_300), "{hung:?}");
        // For 10 s after the last one, and not for ever: new ones show whether it reads again.
        assert_eq!(hung.last(), Some(&37_300), "{hung:?}");
        assert_eq!(hung.len(), 34, "{hung:?}");
    }
}
