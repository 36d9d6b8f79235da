//! A node: a machine with stand-in OAPs, each a process, and a balancer in front of them.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use testkit::fixtures::{Balancer, Machine, binary};

/// How many connections each OAP holds.
pub type Loads = Vec<(String, usize)>;

/// A machine, its OAPs and its balancer. The balancer goes first when it is dropped.
pub struct Node<'a> {
    balancer: Option<Balancer<'a>>,
    oaps: Vec<Oap>,
    machine: &'a Machine,
    /// Where the OAP with a number listens.
    address: fn(u16) -> SocketAddr,
}

impl<'a> Node<'a> {
    /// Starts the OAPs with these numbers, without a balancer.
    pub fn start(machine: &'a Machine, oaps: RangeInclusive<u16>) -> Self {
        Self::start_at(machine, oaps, address)
    }

    /// Starts them where `address` says that they listen.
    pub fn start_at(
        machine: &'a Machine,
        oaps: RangeInclusive<u16>,
        address: fn(u16) -> SocketAddr,
    ) -> Self {
        let start = |number| Oap::start(machine, number, address(number));
        Self {
            balancer: None,
            oaps: oaps.map(start).collect(),
            machine,
            address,
        }
    }

    /// The machine that it is.
    pub fn machine(&self) -> &'a Machine {
        self.machine
    }

    /// Starts one more OAP.
    pub fn start_oap(&mut self, number: u16) {
        let address = (self.address)(number);
        self.oaps.push(Oap::start(self.machine, number, address));
    }

    /// Kills the OAP with this number.
    pub fn kill_oap(&mut self, number: u16) {
        self.oaps.retain(|oap| oap.number != number);
    }

    /// Starts the daemon with this configuration, and waits until it has found the OAPs, which
    /// listen already.
    pub fn balance(&mut self, configuration: &str) {
        let balancer = self
            .balancer
            .insert(Balancer::start(self.machine, configuration));
        balancer.wait_active(self.oaps.len());
    }

    /// The balancer.
    ///
    /// # Panics
    /// Before [`Self::balance`].
    pub fn balancer(&mut self) -> &mut Balancer<'a> {
        self.balancer.as_mut().expect("the balancer was started")
    }

    /// What `ss` in the node's netns says of the established connections that each OAP's process
    /// holds.
    ///
    /// # Panics
    /// When `ss` fails.
    pub fn loads(&self) -> Loads {
        let mut ss = Command::new("ss");
        ss.args([
            "--tcp",
            "--numeric",
            "--processes",
            "--no-header",
            "state",
            "established",
        ]);
        let output = self
            .machine
            .netns
            .run(|| ss.output())
            .expect("`ss` of iproute2 can be started");
        assert!(
            output.status.success(),
            "ss: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let mut counts: HashMap<u32, usize> = HashMap::new();
        for process in String::from_utf8_lossy(&output.stdout)
            .lines()
            .filter_map(owner)
        {
            *counts.entry(process).or_default() += 1;
        }
        self.oaps
            .iter()
            .map(|oap| {
                (
                    oap.name(),
                    counts.get(&oap.process.id()).copied().unwrap_or(0),
                )
            })
            .collect()
    }

    /// What the balancer says of the same, as `status -o json` prints it.
    pub fn loads_by_status(&mut self) -> Loads {
        let counted = self.balancer().service().loads();
        let of = |oap: &Oap| {
            counted
                .get(&address(oap.number))
                .map_or(0, |established| *established as usize)
        };
        self.oaps.iter().map(|oap| (oap.name(), of(oap))).collect()
    }
}

/// Where the OAP with this number listens, on its node.
pub fn address(number: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 21800 + number))
}

/// One stand-in OAP. It ends when this is dropped, and also when this program is killed: its
/// standard input ends then.
struct Oap {
    number: u16,
    process: Child,
}

impl Oap {
    /// Starts it on `machine` and waits until it listens.
    fn start(machine: &Machine, number: u16, address: SocketAddr) -> Self {
        let mut command = Command::new(program());
        command.args(["--until-stdin-ends", "--listen", &address.to_string()]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        // A Ctrl-C at the terminal is for this program, which then ends its servers in order.
        command.process_group(0);
        let mut process = machine
            .run(|| command.spawn())
            .expect("the stand-in can be started");
        let stdout = process.stdout.take().expect("its output is piped");
        let oap = Self { number, process };
        let mut line = String::new();
        BufReader::new(stdout)
            .read_line(&mut line)
            .expect("its output can be read");
        assert!(
            line.starts_with("listening"),
            "{} does not listen on {}: see above",
            oap.name(),
            address
        );
        oap
    }

    fn name(&self) -> String {
        format!("oap-{}", self.number)
    }
}

impl Drop for Oap {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The process in `users:(("standin-oap",pid=4711,fd=9))`.
fn owner(row: &str) -> Option<u32> {
    row.split_once("pid=")?.1.split(',').next()?.parse().ok()
}

/// The stand-in server, which is built into the directory of the balancer.
fn program() -> PathBuf {
    binary().with_file_name("standin-oap")
}
