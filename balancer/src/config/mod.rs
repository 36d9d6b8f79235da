//! The configuration file: read, parse, validate, and say what is wrong and where.
//!
//! A [`Config`] that exists is valid: whoever holds one need not check it again.

mod conflicts;
mod connect;
mod error;
mod fields;
mod kubernetes;
mod read;
mod read_kubernetes;
mod selector;
mod values;
mod yaml;

#[cfg(test)]
mod tests;

use std::{
    fmt,
    fs::File,
    io::{ErrorKind, Read},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use balancer_common::{
    Policy,
    abi::{self, Keepalive},
};
use ipnet::IpNet;

use self::error::Place;
pub use self::{
    connect::{Connect, ConnectEndpoint},
    error::ConfigError,
    kubernetes::{
        ClusterInput, ClusterQuota, ClusterService, DEFAULT_HOLD_FOR, DEFAULT_PORT,
        DEFAULT_PUBLISH_EVERY, DEFAULT_SELECTORS, Kubernetes, MAX_POD_CLASSES, Match, PodClass,
        PortChoice, ServiceChoice,
    },
    selector::{SelectorError, selector},
    values::parse_time,
};

/// The most bytes a configuration file may have.
pub const MAX_FILE_BYTES: u64 = 1 << 20;
/// The most services in one file.
pub const MAX_SERVICES: usize = abi::MAX_SERVICES;
/// The most backends that one service may list.
pub const MAX_SERVICE_BACKENDS: usize = abi::MAX_MEMBERS;
/// The most backends that one file may list.
pub const MAX_BACKENDS: usize = abi::MAX_SLOTS;
/// The most addresses in `to` of one `connect`.
pub const MAX_CONNECT_TO: usize = 256;
/// The most addresses in the `to` of one file.
pub const MAX_CONNECT_TO_IN_ALL: usize = abi::MAX_FRONTENDS;
/// The most endpoints of one `connect`.
pub const MAX_CONNECT_ENDPOINTS: usize = 256;
/// The most endpoints of one file.
pub const MAX_CONNECT_ENDPOINTS_IN_ALL: usize = abi::MAX_ENDPOINTS;
/// The most exempt networks of one service: those of all services fit into the kernel's table.
pub const MAX_EXEMPT: usize = 256;
/// The longest name of a service, in bytes.
pub const MAX_NAME_BYTES: usize = abi::MAX_NAME;
/// The largest weight of a backend.
pub const MAX_WEIGHT: u32 = 1000;
/// The largest quota, number of clients and `min_quota`: more connections than any machine holds.
pub const MAX_CONNECTIONS: u32 = 100_000_000;
/// The most connections that one client may be said to open.
pub const MAX_CONNECTIONS_PER_CLIENT: u32 = 10_000;
/// The largest headroom, in percent.
pub const MAX_HEADROOM_PERCENT: u32 = 1000;
/// `min_quota` where the file gives none: nothing that the other rules would not give. Who is
/// refused by too low a quota is let in by these: quotas open where nobody has room, and there is
/// more room for sources that are refused again and again.
pub const DEFAULT_MIN_QUOTA: u32 = 1;
/// The longest `idle` of `keepalive`, in seconds: the kernel's own.
pub const MAX_KEEPALIVE_IDLE: u16 = 7_200;
/// The longest `interval` of `keepalive`, in seconds.
pub const MAX_KEEPALIVE_INTERVAL: u16 = 600;
/// The most `probes` of `keepalive` (`MAX_TCP_KEEPCNT`, include/net/tcp.h).
pub const MAX_KEEPALIVE_PROBES: u8 = 127;
/// `fail_open_after` where the file gives none.
pub const DEFAULT_FAIL_OPEN_AFTER: Duration = Duration::from_secs(30);

/// What the balancer may change: the key `mode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Effect {
    /// Connections are counted. Nobody is refused or steered on an own port, there are no quotas,
    /// and sockets keep their options.
    Count,
    /// Quotas are computed, and what they would refuse on an own port is counted; like
    /// [`Effect::Count`] it changes nothing.
    DryRun,
    /// Everything that the file says is done.
    #[default]
    On,
}

impl Effect {
    /// Every one, from the least to the most.
    pub const ALL: [Self; 3] = [Self::Count, Self::DryRun, Self::On];

    /// The word in the file and in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Count => "count",
            Self::DryRun => "dry-run",
            Self::On => "on",
        }
    }
}

/// How established connections are moved: the key `move`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MoveRule {
    /// Never.
    Off,
    /// Their clients are told to connect again. One that goes on with a call stays.
    #[default]
    Graceful,
    /// As [`MoveRule::Graceful`], but a call that goes on for long is ended between two messages.
    Close,
}

impl MoveRule {
    /// Where the file says nothing. An Envoy keeps one call for as long as it lives to send its
    /// access log, which is not moved otherwise.
    pub fn of_service(name: &str) -> Self {
        if name == "als" {
            Self::Close
        } else {
            Self::Graceful
        }
    }

    /// The word in the file and in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Graceful => "graceful",
            Self::Close => "close",
        }
    }
}

/// What the balancer is asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// What listens on this host, in the order of the file. With `connects` the entries have
    /// between 1 and [`MAX_SERVICES`] names, or none where there is `kubernetes`.
    pub services: Vec<Service>,
    /// Where connects of this host go, in the order of the file. One that has the name of a service
    /// is of the same entry.
    pub connects: Vec<Connect>,
    /// What of all that is done. Each service holds what this leaves of it: without a quota where
    /// none is computed, and without keepalive where sockets keep their options.
    pub effect: Effect,
    /// How long after the daemon last lived the kernel stops refusing: a second to an hour.
    pub fail_open_after: Duration,
    /// Which netns are guarded; [`NetnsScope::Pods`] where there is `kubernetes`.
    pub namespaces: NetnsScope,
    /// What is balanced in a Kubernetes cluster; `None`: what `services` lists.
    pub kubernetes: Option<Kubernetes>,
}

/// Which netns are guarded: the key `namespaces`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetnsScope {
    /// The one that the daemon was started in.
    Own,
    /// Every one on the machine, also those that come later.
    All,
    /// The netns of these files (`/run/netns/NAME`, `/proc/PID/ns/net`): absolute, no path twice.
    Paths(Vec<PathBuf>),
    /// The netns of the pods that the section `kubernetes` asks for.
    Pods,
}

/// A TCP port that clients connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Unique; 1 to [`MAX_NAME_BYTES`] of `a-z`, `0-9` and `-`.
    pub name: String,
    /// What clients connect to; not 0.
    pub port: u16,
    /// Only connections to this address; `None`: to any. An exact address wins over any. Never an
    /// IPv4-mapped IPv6 address.
    pub address: Option<IpAddr>,
    /// How a backend is chosen.
    pub policy: Policy,
    /// The listeners behind a virtual port, at least one; `None`: every listener on the port.
    pub backends: Option<Vec<Backend>>,
    /// How many connections a backend may hold.
    pub quota: QuotaRule,
    /// Networks of sources that are never refused and never counted against the quota: without host
    /// bits, none twice.
    pub exempt: Vec<IpNet>,
    /// Whether backends that don't serve are avoided.
    pub health: bool,
    /// When a client that has vanished is given up; `None`: the server sees to that.
    pub keepalive: Option<Keepalive>,
    /// How established connections are moved.
    pub moving: MoveRule,
    /// Whether they are moved so that backends are even.
    pub rebalance: bool,
}

impl Service {
    /// What a mode leaves of it. On a virtual port nobody else listens, and a quota would refuse.
    fn within(self, effect: Effect) -> Self {
        let keeps_quota = match effect {
            Effect::On => true,
            Effect::DryRun => self.backends.is_none(),
            Effect::Count => false,
        };
        Self {
            quota: if keeps_quota {
                self.quota
            } else {
                QuotaRule::Unlimited
            },
            keepalive: self.keepalive.filter(|_| effect == Effect::On),
            ..self
        }
    }
}

/// A listener behind a virtual port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Where it listens. No other service has it; never an IPv4-mapped IPv6 address.
    pub address: SocketAddr,
    /// The backend's share relative to the others, 1 to [`MAX_WEIGHT`]; 1 without a key.
    pub weight: u32,
}

/// How the quotas of a service's backends come about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QuotaRule {
    /// None: steering only.
    Unlimited,
    /// This many connections each, weight or not; not 0.
    Fixed(u32),
    /// Computed from the number of clients and of ready backends by [`crate::quota::compute`].
    Computed {
        /// How many clients there are; `None`: not known. Not 0.
        clients: Option<u32>,
        /// How many connections each of them keeps; 1 where the file gives none.
        connections_per_client: u32,
        /// What to add for clients that reconnect or come on top, in percent; 0 without a key.
        headroom_percent: u32,
        /// No backend's quota goes below this; [`DEFAULT_MIN_QUOTA`] where the file gives none.
        min_quota: u32,
    },
}

impl fmt::Display for QuotaRule {
    /// The rule in words, on one line and in less than 128 bytes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unlimited => f.write_str("none: steering only"),
            Self::Fixed(limit) => write!(f, "{limit} for each backend"),
            Self::Computed {
                clients,
                connections_per_client,
                headroom_percent,
                min_quota,
            } => {
                let clients = clients.map_or("clients (not known)".to_owned(), |clients| {
                    format!("{clients} clients")
                });
                let input = format_args!("{clients} × {connections_per_client}");
                write_shared(f, input, *headroom_percent, *min_quota)
            }
        }
    }
}

/// The words of a rule that shares `input` out.
fn write_shared(
    f: &mut fmt::Formatter<'_>,
    input: impl fmt::Display,
    headroom: u32,
    least: u32,
) -> fmt::Result {
    write!(f, "{input} + {headroom}% shared by weight")?;
    if least > DEFAULT_MIN_QUOTA {
        write!(f, ", at least {least} each")?;
    }
    Ok(())
}

impl Config {
    /// Reads and validates the file at `path`.
    ///
    /// # Errors
    /// When the file can't be read, is larger than [`MAX_FILE_BYTES`] or isn't UTF-8, and whenever
    /// [`Config::parse`] fails. The message names the file and, where there is one, the place.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let parse = || Self::from_bytes(&bytes_of(path)?);
        parse().map_err(|error| error.in_file(path))
    }

    /// Parses and validates the content of a configuration file.
    ///
    /// # Errors
    /// When it is larger than [`MAX_FILE_BYTES`] or isn't UTF-8, and whenever [`Config::parse`]
    /// fails.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ConfigError> {
        Self::parse(text_of(bytes)?)
    }

    /// Parses and validates the text of a configuration file.
    ///
    /// # Errors
    /// The first thing that is wrong with it, with its place.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        read::config(text)
    }
}

fn bytes_of(path: &Path) -> error::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)
        // One byte more than allowed tells a file without an end apart (a device, a pipe).
        .and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes))
        .map_err(|error| match error.kind() {
            ErrorKind::NotFound => {
                "no such file; give the path of a configuration file with --config".to_owned()
            }
            ErrorKind::IsADirectory => {
                "this is a directory, not a file; give the path of a file in it with --config"
                    .to_owned()
            }
            ErrorKind::PermissionDenied => {
                "not allowed to read it; run as root, or make the file readable".to_owned()
            }
            _ => format!("can't be read: {error}; check the path given with --config"),
        })
        .map_err(ConfigError::new)?;
    Ok(bytes)
}

fn text_of(bytes: &[u8]) -> error::Result<&str> {
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(ConfigError::new(format!(
            "larger than {MAX_FILE_BYTES} bytes (1 MiB), the most a configuration may have; check that this is the right file"
        )));
    }
    std::str::from_utf8(bytes).or_else(|error| {
        let lines = bytes[..error.valid_up_to()].split(|byte| *byte == b'\n');
        let (count, last) = lines.fold((0, 0), |(count, _), line| (count + 1, line.len()));
        let place = Place {
            line: count,
            column: last + 1,
        };
        place.fail("this is not UTF-8 text; save the file as UTF-8")
    })
}
