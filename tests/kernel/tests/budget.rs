//! What others can make many of takes the daemon only so much time at a time, and what it can't
//! have for a while is no reason to give up what is in force.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;
use balancer::sys::{bpf, shared::SharedArray};
use balancer_common::abi::{Heartbeat, MAX_SLOTS, maps};
use nix::sys::resource::{Resource, getrlimit};
use testkit::fixtures::tcp::{self, Listen};
use testkit::fixtures::{
    Balancer, Deed, Machine, Netns, Stranger, binary, eventually, long, patiently, process, remains,
};

use crate::support::{agents, backend, own_port, source, virtual_port};

/// The longest time between two heartbeats that the map may show.
pub const LONGEST_GAP: Duration = Duration::from_secs(1);
const SETTLES_WITHIN: Duration = Duration::from_secs(60);

/// A process that holds listeners and descriptors: see the program `crowd`. It ends when dropped.
struct Crowd(Child);

impl Crowd {
    fn start(port: u16, netns: usize, descriptors: usize, stay: &str) -> Self {
        let mut command = Command::new(binary().with_file_name("crowd"));
        command.args([port.to_string(), netns.to_string(), descriptors.to_string()]);
        command
            .arg(stay)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = process::spawn(&mut command).expect("`crowd` can be started");
        let output = child.stdout.take().expect("its output");
        let mut line = String::new();
        let read = BufReader::new(output).read_line(&mut line);
        assert_eq!(line, "ready\n", "{read:?}");
        Self(child)
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Ends a watch, also when what it watches panics.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The word of the map that tells when the daemon last lived.
pub struct Pulse(SharedArray);

impl Pulse {
    pub fn of(balancer: &Balancer) -> Self {
        let planes = fs::read_dir(balancer.state()).expect("the state directory");
        let plane = planes.flatten().next().expect("a data plane").path();
        let map = bpf::obj_get(&plane.join("HEARTBEAT")).expect("the pin can be opened");
        let shape = maps::HEARTBEAT;
        let array = SharedArray::open(map, size_of::<Heartbeat>(), shape.entries);
        Self(array.expect("it can be mapped"))
    }

    fn last(&self) -> u64 {
        self.0.word(0, 0).load(Ordering::Acquire)
    }

    /// The longest time without a heartbeat while `work` runs.
    pub fn longest_gap<T>(&self, work: impl FnOnce() -> T) -> (Duration, T) {
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let watch = scope.spawn(|| {
                let (mut last, mut since) = (self.last(), Instant::now());
                let mut longest = Duration::ZERO;
                while !done.load(Ordering::Relaxed) {
                    let now = self.last();
                    if now != last {
                        (last, since) = (now, Instant::now());
                    }
                    longest = longest.max(since.elapsed());
                    let before = Instant::now();
                    thread::sleep(Duration::from_millis(2));
                    // What this thread did not get either is not the daemon's fault.
                    since += before.elapsed().saturating_sub(Duration::from_millis(50));
                }
                longest
            });
            let end = End(&done);
            let result = work();
            drop(end);
            (watch.join().expect("no panic"), result)
        })
    }
}

fn steers(balancer: &Balancer) -> usize {
    let planes = fs::read_dir(balancer.state()).expect("the state directory");
    let pins = planes
        .flatten()
        .flat_map(|plane| fs::read_dir(plane.path()));
    let names = pins.flatten().flatten().map(|pin| pin.file_name());
    let steer = |name: &std::ffi::OsString| name.to_string_lossy().starts_with("link_steer_");
    names.filter(steer).count()
}

fn all_namespaces() -> String {
    let yaml = own_port("least-connections", &["quota: {per_backend: 4}"]);
    format!("{yaml}namespaces: all\n")
}

fn wait_for_steers(balancer: &Balancer, wanted: usize) {
    eventually(SETTLES_WITHIN, || {
        let found = steers(balancer);
        ensure!(
            found == wanted,
            "{found} network namespaces are guarded, want {wanted}"
        );
        Ok(())
    });
}

/// A thread that listens may be gone from its netns: then the netns is found by its socket, among
/// all that its process has.
#[test]
fn a_process_with_many_descriptors_stops_no_heartbeat() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &all_namespaces());
        let own = steers(&balancer);
        let pulse = Pulse::of(&balancer);
        let (gap, _crowd) = pulse.longest_gap(|| {
            let crowd = Crowd::start(agents().port(), 30, 18_000, "leave");
            wait_for_steers(&balancer, own + 30);
            thread::sleep(Duration::from_secs(3));
            crowd
        });
        println!("longest time without a heartbeat: {gap:?}");
        assert!(gap < patiently(LONGEST_GAP), "{gap:?} without a heartbeat");
    });
}

#[test]
fn many_namespaces_that_begin_to_listen_at_once_stop_no_heartbeat() {
    Machine::with(|machine| {
        let number = if long() { 255 } else { 64 };
        let balancer = Balancer::start(machine, &all_namespaces());
        let own = steers(&balancer);
        let pulse = Pulse::of(&balancer);
        let (gap, _crowd) = pulse.longest_gap(|| {
            let crowd = Crowd::start(agents().port(), number, 0, "stay");
            // It answers between them.
            let asked = Instant::now();
            balancer.quota_set("agents", None, 3);
            let answered = asked.elapsed();
            let found = steers(&balancer);
            assert!(
                found < own + number || answered < LONGEST_GAP,
                "it answered only when all were guarded"
            );
            let begin = Instant::now();
            wait_for_steers(&balancer, own + number);
            println!(
                "{number} network namespaces are guarded {:?} after an answer",
                begin.elapsed()
            );
            crowd
        });
        println!("longest time without a heartbeat: {gap:?}");
        assert!(gap < patiently(LONGEST_GAP), "{gap:?} without a heartbeat");
    });
}

/// A daemon that can't open a file does not know whether a netns is there.
#[test]
fn a_daemon_without_descriptors_left_keeps_what_is_in_force() {
    Machine::with(|machine| {
        let netns = Netns::new();
        let yaml = virtual_port("least-connections", 1, &[]);
        let yaml = format!("{yaml}namespaces: [\"{}\"]\n", netns.path().display());
        let balancer = Balancer::start(machine, &yaml);
        let mut listener = netns.run(|| {
            machine.cgroup.enter();
            Listen::on(&backend(0)).open()
        });
        balancer.wait_active(1);
        let mut get_in = || {
            let clients = netns.run(|| tcp::connect_many(agents(), 10));
            listener.accept_all();
            clients.len()
        };
        assert_eq!(get_in(), 10);
        let before = balancer.limit_files(3);
        remains(Duration::from_secs(4), || {
            let found = get_in();
            ensure!(found == 10, "{found} of 10 get in: {}", balancer.logs());
            Ok(())
        });
        assert_eq!(
            balancer.logs().matches("is gone").count(),
            0,
            "{}",
            balancer.logs()
        );
        balancer.limit_files(before);
        let already = balancer.logs().len();
        remains(Duration::from_secs(3), || {
            ensure!(get_in() == 10, "{}", &balancer.logs()[already..]);
            Ok(())
        });
        assert_eq!(balancer.service().active(), 1);
    });
}

/// As [`a_daemon_without_descriptors_left_keeps_what_is_in_force`], where any netns may be guarded.
#[test]
fn a_daemon_without_descriptors_left_keeps_adopted_listeners_of_all_namespaces() {
    Machine::with(|machine| {
        let other = Netns::new();
        other.run(|| {
            machine.cgroup.enter();
            let _listener = Listen::on(&agents()).open();
            let balancer = Balancer::start(machine, &all_namespaces());
            balancer.wait_active(1);
            let guarded = steers(&balancer);
            let before = balancer.limit_files(3);
            remains(Duration::from_secs(4), || {
                ensure!(steers(&balancer) == guarded, "{}", balancer.logs());
                ensure!(balancer.service().active() == 1, "{}", balancer.logs());
                Ok(())
            });
            balancer.limit_files(before);
            assert_eq!(tcp::connect_many(agents(), 7).len(), 4);
        });
    });
}

#[test]
fn more_namespaces_than_descriptors_are_guarded() {
    Machine::with(|machine| {
        let _crowd = Crowd::start(agents().port(), 30, 0, "stay");
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("the limit");
        let mut balancer = Balancer::prepare(machine, &all_namespaces()).with_files(45, hard);
        balancer.launch();
        let found = steers(&balancer);
        assert!(found >= 30, "{found} are guarded: {}", balancer.logs());
    });
}

/// Those that it can't guard are left out, the others are guarded.
#[test]
fn a_namespace_that_no_descriptor_is_left_for_is_left_out() {
    Machine::with(|machine| {
        let _crowd = Crowd::start(agents().port(), 40, 0, "stay");
        let mut balancer = Balancer::prepare(machine, &all_namespaces()).with_files(190, 190);
        balancer.launch();
        let found = steers(&balancer);
        assert!((2..40).contains(&found), "{found} are guarded");
        balancer.wait_for_log("more files may be opened", 0);
        let _listener = Listen::on(&agents()).open();
        assert_eq!(tcp::connect_many(agents(), 7).len(), 4);
        assert!(balancer.status().agent.alive);
    });
}

/// A loop that hangs: it waits for somebody to write the file that it reads.
#[test]
fn a_loop_that_hangs_is_believed_for_half_of_fail_open_after() {
    Machine::with(|machine| {
        let yaml = own_port("least-connections", &["quota: {per_backend: 1}"]);
        let yaml = format!("{yaml}fail_open_after: 4s\n");
        let balancer = Balancer::start(machine, &yaml);
        let _listener = Listen::on(&agents()).open();
        balancer.wait_active(1);
        let _client = tcp::connect(agents()).connected();
        let pulse = Pulse::of(&balancer);
        fs::remove_file(balancer.config()).expect("the file is there");
        let mode = nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR;
        nix::unistd::mkfifo(&balancer.config(), mode).expect("a FIFO can be made");
        balancer.reload();
        let hung = Instant::now();
        // As long as it may only be busy it is believed.
        while hung.elapsed() < Duration::from_millis(1_500) {
            assert!(
                tcp::connect(agents()).is_refused(),
                "after {:?}",
                hung.elapsed()
            );
            thread::sleep(Duration::from_millis(50));
        }
        eventually(SETTLES_WITHIN, || {
            let before = pulse.last();
            thread::sleep(Duration::from_secs(1));
            ensure!(pulse.last() == before, "it has a heartbeat");
            Ok(())
        });
        eventually(SETTLES_WITHIN, || {
            let stale = balancer.service().verdicts("fail-open-stale");
            let let_in = !tcp::connect(agents()).is_refused();
            ensure!(let_in && stale > 0, "still refused");
            Ok(())
        });
        println!(
            "nobody was refused any more {:?} after it hung",
            hung.elapsed()
        );
        // It goes on when it can.
        fs::write(balancer.config(), &yaml).expect("the daemon reads it");
        balancer.wait_for_log(" reloaded ", 0);
        balancer.eventually(|_| {
            ensure!(tcp::connect(agents()).is_refused(), "let in");
            Ok(())
        });
    });
}

/// Listeners that come and go as fast as they can fill the ring of events over and over.
#[test]
fn a_flood_of_events_starves_nobody_and_fills_no_log() {
    Machine::with(|machine| {
        let balancer = Balancer::start(machine, &own_port("least-connections", &[]));
        let pulse = Pulse::of(&balancer);
        let stop = AtomicBool::new(false);
        let rounds = AtomicUsize::new(0);
        let (gap, answered) = pulse.longest_gap(|| {
            thread::scope(|scope| {
                let end = End(&stop);
                for _ in 0..2 {
                    scope.spawn(|| {
                        while !stop.load(Ordering::Relaxed) {
                            drop(Listen::on(&agents()).reuse_port().open());
                            rounds.fetch_add(1, Ordering::Relaxed);
                        }
                    });
                }
                let begin = Instant::now();
                let mut answered = 0;
                while begin.elapsed() < Duration::from_secs(5) {
                    balancer.quota_set("agents", None, 100 + answered);
                    answered += 1;
                }
                drop(end);
                answered
            })
        });
        let logs = balancer.logs();
        let of_events = |line: &&str| !line.contains("by hand: ");
        let lines = logs.lines().filter(of_events).count();
        let rounds = rounds.into_inner();
        println!(
            "{rounds} listeners, {answered} answers, {lines} lines, {gap:?} without a heartbeat"
        );
        assert!(rounds > 1_000, "only {rounds} listeners");
        assert!(answered > 5, "{answered} answers");
        assert!(lines < 150, "{lines} lines in the log");
        assert!(gap < patiently(LONGEST_GAP), "{gap:?} without a heartbeat");
    });
}

/// The most memory that the daemon has had, in KiB.
pub fn peak_memory(balancer: &Balancer) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", balancer.pid()));
    let status = status.expect("the daemon lives");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    kib.and_then(|kib| kib.trim().parse().ok()).expect("VmHWM")
}

/// The processor time that the daemon has had.
pub fn processor_time(balancer: &Balancer) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{}/stat", balancer.pid()));
    let stat = stat.expect("the daemon lives");
    let (_, fields) = stat.rsplit_once(')').expect("its name");
    // utime and stime, in hundredths of a second (proc_pid_stat(5)).
    let times = fields.split_whitespace().skip(11).take(2);
    let hundredths: u64 = times.filter_map(|field| field.parse::<u64>().ok()).sum();
    Duration::from_millis(10 * hundredths)
}

/// Services without room for more, ten times the listeners that have slots, ten times the sources
/// that are remembered, network namespaces and descriptors, all at the same time.
#[test]
fn ten_times_every_limit_at_once_leaves_heartbeat_memory_and_log_in_bounds() {
    const SERVICES: u16 = 64;
    const LISTENERS: usize = 10 * MAX_SLOTS;
    const SOURCES: usize = 2_560;
    Machine::with(|machine| {
        let service = |n| {
            let port = agents().port() + n;
            format!("{{name: service-{n}, port: {port}, quota: {{per_backend: 1}}}}")
        };
        let services: Vec<_> = (0..SERVICES).map(service).collect();
        let yaml = format!("services: [{}]\nnamespaces: all\n", services.join(", "));
        let balancer = Balancer::start(machine, &yaml);
        let pulse = Pulse::of(&balancer);
        let begin = Instant::now();
        let (gap, _held) = pulse.longest_gap(|| {
            // Half of them in namespaces of their own.
            let strangers = [(); 4].map(|()| {
                let each = u32::try_from(LISTENERS / 2 / 4 / 8).expect("few");
                machine.run(|| Stranger::start(agents(), 8, Deed::Hold(each)))
            });
            let crowd = Crowd::start(agents().port(), 20, 18_000, "leave");
            let listen = |n: usize| {
                let port = agents().port() + u16::try_from(n).expect("few") % SERVICES;
                Listen::on(&SocketAddr::new(agents().ip(), port))
                    .reuse_port()
                    .open()
            };
            let listeners: Vec<_> = (0..LISTENERS / 2).map(listen).collect();
            let mut clients = Vec::new();
            for n in 0..SOURCES {
                clients.extend(tcp::connect_from(source(n), agents()).ok());
            }
            while begin.elapsed() < Duration::from_secs(if long() { 180 } else { 45 }) {
                balancer.quota_set("service-1", None, 7);
                thread::sleep(Duration::from_secs(1));
            }
            (strangers, crowd, listeners, clients)
        });
        let took = begin.elapsed();
        let memory = peak_memory(&balancer);
        let logs = balancer.logs();
        let of_daemon = |line: &&str| !line.contains("by hand: ");
        let lines = logs.lines().filter(of_daemon).count();
        println!("{gap:?} without a heartbeat, {memory} KiB, {lines} lines in {took:?}");
        assert!(gap < patiently(LONGEST_GAP), "{gap:?} without a heartbeat");
        assert!(memory < 64 << 10, "{memory} KiB");
        let minutes = took.as_secs().div_ceil(60);
        let most = 100 * usize::try_from(minutes).expect("few");
        assert!(lines < most, "{lines} lines in {took:?}: {logs}");
    });
}

/// Many network namespaces, descriptors, listeners and events at the same time.
#[test]
fn everything_at_once_stops_no_heartbeat() {
    Machine::with(|machine| {
        let (stay, leave) = if long() { (255, 60) } else { (20, 8) };
        let balancer = Balancer::start(machine, &all_namespaces());
        let own = steers(&balancer);
        let pulse = Pulse::of(&balancer);
        let stop = AtomicBool::new(false);
        let (gap, _crowds) = pulse.longest_gap(|| {
            thread::scope(|scope| {
                let end = End(&stop);
                scope.spawn(|| {
                    machine.run(|| {
                        while !stop.load(Ordering::Relaxed) {
                            drop(Listen::on(&agents()).reuse_port().open());
                            // A slot rests for a second: faster, and none would be left.
                            thread::sleep(Duration::from_millis(5));
                        }
                    });
                });
                let crowds = [
                    Crowd::start(agents().port(), leave, 18_000, "leave"),
                    Crowd::start(agents().port(), stay, 0, "stay"),
                ];
                balancer.quota_set("agents", None, 3);
                wait_for_steers(&balancer, own + stay + leave);
                drop(end);
                crowds
            })
        });
        let lines = balancer.logs().lines().count();
        println!("longest time without a heartbeat: {gap:?}; {lines} lines in the log");
        assert!(gap < patiently(LONGEST_GAP), "{gap:?} without a heartbeat");
        assert!(lines < 300, "{lines} lines in the log");
    });
}
