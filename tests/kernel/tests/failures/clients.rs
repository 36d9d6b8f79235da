//! Clients as real ones are: they give up after a second, come back after pauses that grow, and
//! stay where they are served.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use testkit::fixtures::tcp;

/// How long a client waits for a connection, and for an answer.
const PATIENCE: Duration = Duration::from_secs(1);
/// Between two questions on a connection.
const ASKS_EVERY: Duration = Duration::from_millis(200);
/// Who has been answered for so long on one connection is served.
const LASTS: Duration = Duration::from_secs(1);
/// The pause after the first failure. It doubles, and changes by a fifth by chance.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
const STACK: usize = 128 << 10;

/// Where a client comes from, and the addresses of which it takes one by chance at each try.
pub struct Client {
    pub from: SocketAddr,
    pub to: Vec<SocketAddr>,
}

/// What one client has seen.
#[derive(Default)]
struct Seen {
    /// The first and the last answer on the connection that it has.
    answers: Option<(Instant, Instant)>,
    /// Since it was served, or since [`Clients::begin`].
    tries: usize,
    /// How many tries it took until it was served, each time.
    searches: Vec<usize>,
}

impl Seen {
    fn is_served(&self, now: Instant) -> bool {
        self.answers.is_some_and(|(first, last)| {
            last - first >= LASTS && now.saturating_duration_since(last) < ASKS_EVERY + PATIENCE
        })
    }

    fn answered(&mut self) {
        let now = Instant::now();
        let (first, _) = *self.answers.get_or_insert((now, now));
        self.answers = Some((first, now));
        if self.is_served(now) && self.tries > 0 {
            self.searches.push(self.tries);
            self.tries = 0;
        }
    }
}

/// Clients in threads of their own. Dropping it ends them.
pub struct Clients {
    seen: Vec<Arc<Mutex<Seen>>>,
    stopping: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Clients {
    /// Starts them in the netns of the calling thread.
    pub fn start(clients: Vec<Client>) -> Self {
        let stopping = Arc::new(AtomicBool::new(false));
        let mut all = Self {
            seen: Vec::new(),
            stopping: Arc::clone(&stopping),
            threads: Vec::new(),
        };
        for (number, client) in clients.into_iter().enumerate() {
            let seen = Arc::<Mutex<Seen>>::default();
            all.seen.push(Arc::clone(&seen));
            let run = Run {
                client,
                seen,
                stopping: Arc::clone(&stopping),
                chance: Chance(number as u64 + 1),
            };
            let thread = thread::Builder::new().stack_size(STACK);
            let thread = thread.spawn(move || run.until_stopped());
            all.threads.push(thread.expect("a thread can be started"));
        }
        all
    }

    /// Counts tries from now on.
    pub fn begin(&self) {
        for seen in &self.seen {
            let mut seen = lock(seen);
            seen.tries = 0;
            seen.searches.clear();
        }
    }

    /// How many there are.
    pub fn number(&self) -> usize {
        self.seen.len()
    }

    /// How many are served.
    pub fn served(&self) -> usize {
        let now = Instant::now();
        let seen = self.seen.iter();
        seen.filter(|seen| lock(seen).is_served(now)).count()
    }

    /// How many tries each search for a server has taken, also those that go on; sorted.
    pub fn tries(&self) -> Vec<usize> {
        let mut tries = Vec::new();
        for seen in &self.seen {
            let seen = lock(seen);
            tries.extend(&seen.searches);
            tries.extend(Some(seen.tries).filter(|tries| *tries > 0));
        }
        tries.sort_unstable();
        tries
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let ended = thread.join();
            assert!(ended.is_ok() || thread::panicking(), "a client panicked");
        }
    }
}

/// One client at work.
struct Run {
    client: Client,
    seen: Arc<Mutex<Seen>>,
    stopping: Arc<AtomicBool>,
    chance: Chance,
}

impl Run {
    fn until_stopped(mut self) {
        let mut pause = FIRST_PAUSE;
        while self.goes_on() {
            if self.is_served_by_the_next() {
                pause = FIRST_PAUSE;
            }
            self.chance.sleep(pause);
            pause = LONGEST_PAUSE.min(pause * 2);
        }
    }

    fn goes_on(&self) -> bool {
        !self.stopping.load(Ordering::Relaxed)
    }

    /// Connects and stays for as long as it is answered; whether it was served.
    fn is_served_by_the_next(&mut self) -> bool {
        lock(&self.seen).tries += 1;
        let to = self.client.to[self.chance.below(self.client.to.len())];
        let outcome = tcp::attempt(Some(self.client.from), to, PATIENCE);
        if let Some(connection) = outcome.ok() {
            let _ = self.stay(connection);
        }
        let answers = lock(&self.seen).answers.take();
        answers.is_some_and(|(first, last)| last - first >= LASTS)
    }

    fn stay(&mut self, mut connection: TcpStream) -> io::Result<()> {
        connection.set_read_timeout(Some(PATIENCE))?;
        while self.goes_on() {
            connection.write_all(b"?")?;
            connection.read_exact(&mut [0])?;
            lock(&self.seen).answered();
            self.chance.sleep(ASKS_EVERY);
        }
        Ok(())
    }
}

/// Numbers by chance, the same in each run (Knuth's MMIX constants).
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: usize) -> usize {
        let next = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = next.wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).expect("31 bits") % bound
    }

    /// Sleeps for so long, a fifth more or less.
    fn sleep(&mut self, about: Duration) {
        let percent = u32::try_from(80 + self.below(41)).expect("a small number");
        thread::sleep(about * percent / 100);
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}
