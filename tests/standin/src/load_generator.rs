//! Clients that stay: each keeps one connection, and opens it again where it ends, with the pauses
//! of gRPC's own clients (<https://github.com/grpc/grpc/blob/master/doc/connection-backoff.md>).

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher as _, Hasher as _};
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::client::Client;

/// Longer than a second and a third SYN take (1 s and 3 s).
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// Longer than an answer takes on a busy machine.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const PAUSE_GROWS_BY: f64 = 1.6;
const JITTER: f64 = 0.2;

/// Why a client had no connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// It had none yet.
    Start,
    /// A RST ended it.
    Reset,
    /// The server closed it.
    Closed,
    /// A call on it failed, or was not answered in time.
    Call,
    /// It was told to open a new one.
    Told,
}

/// A time in which a client had no connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outage {
    /// What began it.
    pub cause: Cause,
    /// When it began, in milliseconds since 1970.
    pub began: u64,
    /// When the first call on the next connection was answered; `None`: it lasts.
    pub ended: Option<u64>,
    /// Connects that were refused meanwhile.
    pub refused: u32,
}

/// What the clients of a [`LoadGenerator`] have seen so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// How many clients there are.
    pub clients: u32,
    /// How many of them have a connection.
    pub connected: u32,
    /// Connects that a RST answered.
    pub refused: u64,
    /// Connects that nothing answered in five seconds.
    pub timed_out: u64,
    /// Connects that failed in another way, the first call on the connection included.
    pub failed: u64,
    /// Connections that a RST ended.
    pub reset: u64,
    /// Connections that the server closed.
    pub closed: u64,
    /// Connections that were given up because a call on them failed.
    pub unanswered: u64,
    /// All times without a connection, in the order in which they began.
    pub outages: Vec<Outage>,
}

impl Tally {
    /// Connections that ended without the client's wish.
    pub fn lost(&self) -> u64 {
        self.reset + self.closed + self.unanswered
    }

    /// The longest time that a client was without a connection, of all the time after `since` (in
    /// milliseconds since 1970), as of `now`.
    pub fn longest_outage(&self, since: u64, now: u64) -> Duration {
        let outages = self.outages.iter();
        let longest = outages
            .map(|outage| {
                let ended = outage.ended.unwrap_or(now);
                ended.saturating_sub(outage.began.max(since))
            })
            .max();
        Duration::from_millis(longest.unwrap_or(0))
    }

    /// Adds what other clients have seen.
    pub fn add(&mut self, other: &Self) {
        self.clients += other.clients;
        self.connected += other.connected;
        self.refused += other.refused;
        self.timed_out += other.timed_out;
        self.failed += other.failed;
        self.reset += other.reset;
        self.closed += other.closed;
        self.unanswered += other.unanswered;
        self.outages.extend_from_slice(&other.outages);
    }
}

/// Milliseconds since 1970.
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(since.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}

/// How the clients behave.
#[derive(Clone, Copy, Debug)]
pub struct Behaviour {
    /// Where they connect to.
    pub to: SocketAddr,
    /// How many there are.
    pub clients: u32,
    /// They begin within this time.
    pub begin_within: Duration,
    /// Each makes a call so often.
    pub call_every: Duration,
    /// No pause between two connects is longer, but for the jitter.
    pub longest_pause: Duration,
}

/// Clients that stay.
pub struct LoadGenerator {
    tally: Arc<Mutex<Tally>>,
    order: watch::Sender<Duration>,
}

impl LoadGenerator {
    /// Starts them. They live as long as the runtime.
    pub fn start(behaviour: Behaviour) -> Self {
        let tally = Tally {
            clients: behaviour.clients,
            ..Tally::default()
        };
        let load = Self {
            tally: Arc::new(Mutex::new(tally)),
            order: watch::Sender::new(Duration::ZERO),
        };
        for number in 0..behaviour.clients {
            let client = LongLivedClient {
                name: format!("client-{number}"),
                behaviour,
                tally: Arc::clone(&load.tally),
                order: load.order.subscribe(),
            };
            tokio::spawn(client.run());
        }
        load
    }

    /// What they have seen so far.
    pub fn tally(&self) -> Tally {
        locked(&self.tally).clone()
    }

    /// Tells all to close their connections and open new ones, at some moment within this time.
    pub fn reconnect(&self, within: Duration) {
        self.order.send_replace(within);
    }

    /// Answers questions, for ever: a connection that says `reconnect MILLISECONDS` or anything
    /// else in one line gets the tally as JSON.
    ///
    /// # Errors
    /// When connections can't be accepted any more.
    pub async fn answer(&self, listener: TcpListener) -> io::Result<()> {
        loop {
            let (mut stream, _) = listener.accept().await?;
            let mut question = String::new();
            let heard = timeout(ANSWER_WITHIN, stream.read_to_string(&mut question)).await;
            if !matches!(heard, Ok(Ok(_))) {
                continue;
            }
            let within = question.trim().strip_prefix("reconnect ");
            if let Some(within) = within.and_then(|number| number.parse().ok()) {
                self.reconnect(Duration::from_millis(within));
            }
            let answer = serde_json::to_vec(&self.tally())?;
            // Whoever has gone away meanwhile does not want it.
            let _ = timeout(ANSWER_WITHIN, stream.write_all(&answer)).await;
        }
    }
}

/// Asks a load generator that [answers](LoadGenerator::answer).
///
/// # Errors
/// When it does not.
pub fn ask(address: SocketAddr, question: &str) -> io::Result<Tally> {
    use std::io::{Read as _, Write as _};
    let mut stream = std::net::TcpStream::connect_timeout(&address, CONNECT_WITHIN)?;
    stream.set_read_timeout(Some(ANSWER_WITHIN))?;
    stream.write_all(question.as_bytes())?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(serde_json::from_slice(&answer)?)
}

struct LongLivedClient {
    name: String,
    behaviour: Behaviour,
    tally: Arc<Mutex<Tally>>,
    order: watch::Receiver<Duration>,
}

impl LongLivedClient {
    async fn run(mut self) {
        let mut cause = Cause::Start;
        let mut begin = self.behaviour.begin_within;
        loop {
            let outage = self.begin_outage(cause);
            sleep(begin.mul_f64(random())).await;
            let (client, ending) = self.connect(outage).await;
            self.end_outage(outage);
            cause = self.keep(client, ending).await;
            begin = match cause {
                Cause::Told => *self.order.borrow(),
                _ => Duration::ZERO,
            };
        }
    }

    /// Tries until it has one that answers.
    async fn connect(&self, outage: usize) -> (Client, Ending) {
        let mut pause = FIRST_PAUSE;
        loop {
            match open(&self.name, self.behaviour.to).await {
                Ok(connection) => return connection,
                Err(error) => self.note(outage, error.kind()),
            }
            sleep(pause.mul_f64(1.0 + JITTER * (2.0 * random() - 1.0))).await;
            pause = pause
                .mul_f64(PAUSE_GROWS_BY)
                .min(self.behaviour.longest_pause.max(FIRST_PAUSE));
        }
    }

    /// Keeps it until it ends; says how.
    async fn keep(&mut self, mut client: Client, mut ending: Ending) -> Cause {
        self.order.mark_unchanged();
        let mut calls = interval(self.behaviour.call_every);
        calls.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let cause = tokio::select! {
                cause = ending.recv() => cause.unwrap_or(Cause::Call),
                _ = self.order.changed() => Cause::Told,
                _ = calls.tick() => match timeout(ANSWER_WITHIN, client.ping()).await {
                    Ok(Ok(())) => continue,
                    // A connection that ends fails the call, too.
                    _ => ending.try_recv().unwrap_or(Cause::Call),
                },
            };
            return cause;
        }
    }

    fn begin_outage(&self, cause: Cause) -> usize {
        let mut tally = locked(&self.tally);
        let counter = match cause {
            Cause::Start | Cause::Told => None,
            Cause::Reset => Some(&mut tally.reset),
            Cause::Closed => Some(&mut tally.closed),
            Cause::Call => Some(&mut tally.unanswered),
        };
        if let Some(counter) = counter {
            *counter += 1;
        }
        if cause != Cause::Start {
            tally.connected -= 1;
        }
        tally.outages.push(Outage {
            cause,
            began: now(),
            ended: None,
            refused: 0,
        });
        tally.outages.len() - 1
    }

    fn end_outage(&self, index: usize) {
        let mut tally = locked(&self.tally);
        tally.outages[index].ended = Some(now());
        tally.connected += 1;
    }

    fn note(&self, outage: usize, kind: ErrorKind) {
        let mut tally = locked(&self.tally);
        match kind {
            ErrorKind::ConnectionRefused => {
                tally.refused += 1;
                tally.outages[outage].refused += 1;
            }
            ErrorKind::TimedOut => tally.timed_out += 1,
            _ => tally.failed += 1,
        }
    }
}

/// Tells how a connection ended, as soon as it has.
type Ending = mpsc::Receiver<Cause>;

/// A connection on which a call was answered.
async fn open(name: &str, to: SocketAddr) -> io::Result<(Client, Ending)> {
    let stream = timeout(CONNECT_WITHIN, TcpStream::connect(to)).await??;
    stream.set_nodelay(true)?;
    let (tell, ending) = mpsc::channel(1);
    let watched = Watched { stream, tell };
    let answered = timeout(ANSWER_WITHIN, async {
        let mut client = Client::over(name.to_owned(), watched).await?;
        client.ping().await.map_err(io::Error::other)?;
        io::Result::Ok(client)
    });
    match answered.await {
        Ok(Ok(client)) => Ok((client, ending)),
        // Not `TimedOut`: that is said of connects that nothing answers.
        Err(_) => Err(io::Error::other("the first call was not answered")),
        Ok(Err(error)) => Err(error),
    }
}

/// A stream that says how it ends.
struct Watched {
    stream: TcpStream,
    tell: mpsc::Sender<Cause>,
}

impl Watched {
    /// Only the first end counts: what comes after it follows from it.
    fn watch<T>(&self, result: io::Result<T>) -> io::Result<T> {
        if let Err(error) = &result {
            let _ = self.tell.try_send(match error.kind() {
                ErrorKind::ConnectionReset => Cause::Reset,
                _ => Cause::Closed,
            });
        }
        result
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let result = ready!(Pin::new(&mut self.stream).poll_read(context, buffer));
        let at_end = result.is_ok() && buffer.filled().len() == before && buffer.remaining() > 0;
        if at_end {
            let _ = self.tell.try_send(Cause::Closed);
        }
        Poll::Ready(self.watch(result))
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = ready!(Pin::new(&mut self.stream).poll_write(context, bytes));
        Poll::Ready(self.watch(result))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// Between 0 and 1; the standard library keys its hash tables with random numbers, and needs no
/// more than that here.
fn random() -> f64 {
    let number = RandomState::new().build_hasher().finish() >> 32;
    f64::from(u32::try_from(number).unwrap_or_default()) / f64::from(u32::MAX)
}

fn locked(tally: &Mutex<Tally>) -> MutexGuard<'_, Tally> {
    tally.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Behaviour, Cause, LoadGenerator, Outage, Tally, ask, now};
    use crate::{listen, serve};

    fn behaviour(to: std::net::SocketAddr) -> Behaviour {
        Behaviour {
            to,
            clients: 3,
            begin_within: Duration::ZERO,
            call_every: Duration::from_millis(50),
            longest_pause: Duration::from_secs(1),
        }
    }

    async fn until(load: &LoadGenerator, what: impl Fn(&Tally) -> bool) -> Tally {
        for _ in 0..1000 {
            let tally = load.tally();
            if what(&tally) {
                return tally;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("not within ten seconds: {:?}", load.tally());
    }

    #[tokio::test]
    async fn clients_come_back_when_their_server_does_and_say_what_happened() {
        let listener = listen("127.0.0.1:0".parse().unwrap(), 16).unwrap();
        let address = listener.local_addr().unwrap();
        // A runtime of its own, so that the connections end with it, too.
        let server = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let std_listener = listener.into_std().unwrap();
        server.spawn(async move {
            serve(tokio::net::TcpListener::from_std(std_listener).unwrap()).await
        });
        let load = LoadGenerator::start(behaviour(address));
        let tally = until(&load, |tally| tally.connected == 3).await;
        assert_eq!((tally.lost(), tally.outages.len()), (0, 3));

        server.shutdown_background();
        let tally = until(&load, |tally| tally.refused >= 3).await;
        assert_eq!((tally.connected, tally.lost()), (0, 3));
        tokio::spawn(serve(listen(address, 16).unwrap()));
        let tally = until(&load, |tally| tally.connected == 3).await;
        assert_eq!(tally.outages.len(), 6);
        assert!(tally.outages.iter().all(|outage| outage.ended.is_some()));
    }

    #[tokio::test]
    async fn clients_that_are_told_to_open_new_connections_have_lost_none() {
        let listener = listen("127.0.0.1:0".parse().unwrap(), 16).unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener));
        let load = LoadGenerator::start(behaviour(address));
        until(&load, |tally| tally.connected == 3).await;
        let questions = listen("127.0.0.1:0".parse().unwrap(), 16).unwrap();
        let at = questions.local_addr().unwrap();
        let answer = tokio::task::spawn_blocking(move || ask(at, "reconnect 0\n"));
        tokio::select! {
            _ = load.answer(questions) => panic!("it answers for ever"),
            answer = answer => assert_eq!(answer.unwrap().unwrap().clients, 3),
        }
        let all = |tally: &Tally| tally.outages.len() == 6 && tally.connected == 3;
        let tally = until(&load, all).await;
        assert_eq!(tally.lost(), 0);
        assert_eq!(tally.outages[5].cause, Cause::Told);
    }

    #[test]
    fn the_longest_outage_is_cut_at_the_moment_that_is_asked_for() {
        let outage = |began, ended| Outage {
            cause: Cause::Reset,
            began,
            ended,
            refused: 0,
        };
        let tally = Tally {
            outages: vec![outage(1000, Some(5000)), outage(6000, None)],
            ..Tally::default()
        };
        let longest = |since| tally.longest_outage(since, 7500).as_millis();
        assert_eq!(longest(0), 4000);
        assert_eq!(longest(4500), 1500);
        assert_eq!(longest(7000), 500);
        assert!(now() > 1_700_000_000_000);
    }
}
