//! What the maps say, read without the daemon.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::Result;
use balancer_common::abi::{
    AuditTotals, Backend, BackendState, HealthState, Heartbeat, Keepalive, KeepaliveWord, Policy,
    ServiceInfo, ServicePort, Silence, SlotMoves, ticks,
};
use balancer_common::decision::admission;
use balancer_common::decision::member::Member;
use balancer_common::{Reason, Verdict};

use super::super::down::{DownNote, not_listened_on};
use super::super::services;
use super::super::tables::{SlotView, Tables, span_of, text};
use super::placing::{self, EndpointGroupSnapshot, PlacingContents};
use crate::config::Effect;
use crate::quota::in_force::{of_service, written, written_for_server};
use crate::quota::{InForce, QuotaSource};
use crate::sys::clock;

/// The data plane at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The services, in the order of their ids.
    pub services: Vec<ServiceSnapshot>,
    /// Where connects of this node go, in the order of the groups' indexes.
    pub placing: Vec<EndpointGroupSnapshot>,
    /// The daemon's signs of life.
    pub daemon: DaemonSnapshot,
}

/// Whether the daemon lives.
#[derive(Clone, Copy, Debug)]
pub struct DaemonSnapshot {
    /// The kernel half takes it for alive, and refuses where it must.
    pub refuses: bool,
    /// Since its last sign of life; `None`: there was none yet.
    pub heartbeat_age: Option<Duration>,
    /// After how long a silence nobody is refused any more.
    pub fail_open_after: Duration,
    /// How the counts compared with the socket table last.
    pub audit_totals: AuditTotals,
}

/// One service.
#[derive(Clone, Debug)]
pub struct ServiceSnapshot {
    /// The service's id: its index in every map by service.
    pub id: u16,
    /// The service's name in the configuration.
    pub name: String,
    /// The port that clients connect to.
    pub port: u16,
    /// Only SYNs to this address; `None`: any.
    pub address: Option<IpAddr>,
    /// How the service chooses among its backends.
    pub policy: Policy,
    /// Nothing listens on the port itself.
    pub virtual_port: bool,
    /// What of all that is done.
    pub effect: Effect,
    /// The quota rule in words.
    pub rule: String,
    /// Why the quotas are as they are.
    pub sentence: String,
    /// When a client that has vanished is given up; `None`: the server sees to that.
    pub keepalive: Option<Keepalive>,
    /// A quota set by hand for every backend.
    pub quota_override: Option<u32>,
    /// Established connections through the virtual port that are counted on no backend.
    pub unattributed: u32,
    /// The service's backends, in the order of their slots.
    pub backends: Vec<BackendSnapshot>,
    /// The backends that the file or the cluster names and nobody listens as, in the order of their
    /// addresses.
    pub down: Vec<DownBackend>,
    /// How often each reason was given; look-ups, not connections.
    pub verdicts: Vec<(Reason, u64)>,
    /// Mistakes of the file that show around the maps: whoever has looked there adds them.
    pub warnings: Vec<String>,
}

/// One backend.
#[derive(Clone, Debug)]
pub struct BackendSnapshot {
    /// The backend's slot: its index in every map by slot.
    pub slot: u32,
    /// The address and port that the listener is bound to.
    pub address: SocketAddr,
    /// Cookie of the netns that it listens in.
    pub netns: u64,
    /// The state of its slot: only an active backend takes connections.
    pub state: BackendState,
    /// How many connections it should have, in proportion to the others' weights.
    pub weight: u32,
    /// The most connections that it should hold; `None`: unlimited.
    pub quota: Option<u32>,
    /// Whether the quota was set by hand, for it or for its service.
    pub overridden: bool,
    /// The server that it is a listener of; `None`: the daemon has not put it together yet.
    pub server: Option<ServerSnapshot>,
    /// Connections in ESTABLISHED, the exempt ones among them.
    pub established: u32,
    /// Exempt connections in ESTABLISHED.
    pub exempt: u32,
    /// SYNs sent to it in the last 1.1 s that have not become established; `None`: can't be read.
    pub pending: Option<u32>,
    /// How silent its connections were when the daemon last looked.
    pub silence: Silence,
    /// Whether it is taken out by hand: no new connections, and the present ones are moved.
    pub drained: bool,
    /// What has become of its connections that were moved.
    pub moves: SlotMoves,
    /// Whether SYNs can be steered to it.
    pub steerable: bool,
    /// How it serves; `None`: it does not listen, or its health is not regarded.
    pub health: Option<BackendHealth>,
    /// What an administrator should know of it, in words.
    pub note: Option<String>,
}

/// A backend that is named and does not listen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DownBackend {
    /// Where it should listen.
    pub address: SocketAddr,
    /// For how long the daemon has known that it does not; `None`: no daemon has noticed it.
    pub since: Option<Duration>,
}

impl DownBackend {
    /// The word in the place of a slot's state.
    pub const STATE: &'static str = "down";
}

/// The health of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackendHealth {
    /// Whether it serves.
    pub state: HealthState,
    /// For how long it has been in that state; zero while it serves.
    pub age: Duration,
}

impl BackendHealth {
    /// Whether it does not serve.
    pub fn is_bad(&self) -> bool {
        self.state != HealthState::Serving
    }

    /// Nothing speaks against it.
    pub const SERVING: Self = Self {
        state: HealthState::Serving,
        age: Duration::ZERO,
    };
}

impl ServiceSnapshot {
    /// What the kernel is told with a reason.
    pub fn verdict(&self, reason: Reason) -> Verdict {
        if self.effect == Effect::On || self.virtual_port {
            reason.verdict(self.virtual_port)
        } else {
            Verdict::Pass
        }
    }
}

impl BackendSnapshot {
    /// The quota of its server, of which it has a part; `None`: unlimited.
    pub fn server_quota(&self) -> Option<u32> {
        self.server.map_or(self.quota, |server| server.quota)
    }
}

/// A process, or in a cluster a pod, whose listeners share its quota.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerSnapshot {
    /// The slot of its first listener: the same for each of them.
    pub first_slot: u32,
    /// The most connections that it should hold; `None`: unlimited.
    pub quota: Option<u32>,
}

/// What the maps hold of a service.
#[derive(Clone, Debug)]
pub struct ServiceContents {
    /// The service's id: its index in every map by service.
    pub id: u16,
    /// The element of `SERVICE_INFO`.
    pub info: ServiceInfo,
    /// The element of `KEEPALIVE`.
    pub keepalive: KeepaliveWord,
    /// How often each reason was given.
    pub verdicts: Vec<(Reason, u64)>,
}

/// What the maps hold at one moment, as it stands there: all that a [`Snapshot`] is made of.
#[derive(Clone, Debug)]
pub struct MapContents {
    /// The services that have a name.
    pub services: Vec<ServiceContents>,
    /// The slots that are taken.
    pub slots: Vec<Member>,
    /// The addresses that services list for their backends, by the service's id.
    pub listed: BTreeMap<u16, BTreeSet<SocketAddr>>,
    /// The backends that are down as the daemon has noted it.
    pub down: Vec<DownNote>,
    /// How silent the connections of a slot are, by its number.
    pub silences: BTreeMap<u32, Silence>,
    /// What has become of moved connections of a slot, by its number.
    pub moves: BTreeMap<u32, SlotMoves>,
    /// The daemon's last sign of life.
    pub heartbeat: Heartbeat,
    /// How the counts compared with the socket table last.
    pub audit_totals: AuditTotals,
    /// What is of placing.
    pub placing: PlacingContents,
    /// The time, ns of `CLOCK_MONOTONIC`.
    pub now_ns: u64,
}

impl Snapshot {
    /// Makes sense of what the maps hold, whatever that is.
    pub fn of(contents: &MapContents) -> Self {
        let mut backends: HashMap<u16, Vec<&Member>> = HashMap::new();
        for member in &contents.slots {
            backends
                .entry(member.backend.service)
                .or_default()
                .push(member);
        }
        let service = |of_service: &ServiceContents| {
            let members = backends.remove(&of_service.id).unwrap_or_default();
            let mut service = ServiceSnapshot {
                down: down(contents, of_service, &members),
                ..service(of_service, &members, ticks(contents.now_ns))
            };
            for backend in &mut service.backends {
                let silence = contents.silences.get(&backend.slot);
                backend.silence = silence.copied().unwrap_or_default();
                let moves = contents.moves.get(&backend.slot);
                backend.moves = moves.copied().unwrap_or_default();
            }
            service
        };
        Self {
            services: contents.services.iter().map(service).collect(),
            placing: placing::groups(&contents.placing, contents.now_ns),
            daemon: daemon(contents),
        }
    }

    /// What becomes of established connections once the data plane is out of the kernel, where
    /// that is not obvious: nothing but the processes that hold it tells then which backend a
    /// connection through a virtual port is of.
    pub fn left_open(&self) -> Option<String> {
        let connections = match self.through_virtual_ports() {
            0 => return None,
            1 => "1 established connection through a virtual port stays open".to_owned(),
            many => format!("{many} established connections through virtual ports stay open"),
        };
        Some(format!(
            "{connections}: the next `balancer run` finds whose they are by the processes that \
             hold them, and says where it can't"
        ))
    }

    fn through_virtual_ports(&self) -> u64 {
        let virtual_ports = self.services.iter().filter(|service| service.virtual_port);
        let established = |service: &ServiceSnapshot| -> u64 {
            let backends = service.backends.iter();
            let counted: u64 = backends.map(|backend| u64::from(backend.established)).sum();
            counted + u64::from(service.unattributed)
        };
        virtual_ports.map(established).sum()
    }
}

/// Reads the data plane as it is now; `down` is what the daemon has noted.
pub fn take(tables: &Tables, down: &[DownNote]) -> Result<Snapshot> {
    let services = tables
        .named_services()?
        .into_iter()
        .map(|(id, info)| {
            let verdicts = tables.verdicts(id)?;
            Ok(ServiceContents {
                id,
                info,
                keepalive: KeepaliveWord::new(tables.keepalive(id)),
                verdicts,
            })
        })
        .collect::<Result<_>>()?;
    let slots = tables.slots()?;
    let silence = |view: &SlotView| (view.slot(), tables.silence(view.slot()));
    let moves = |view: &SlotView| (view.slot(), tables.moves(view.id()));
    Ok(Snapshot::of(&MapContents {
        services,
        silences: slots.iter().map(silence).collect(),
        moves: slots.iter().map(moves).collect(),
        slots: slots.into_iter().map(|view| view.member).collect(),
        listed: services::rules(tables)?.listed(),
        down: down.to_vec(),
        heartbeat: tables.heartbeat(),
        audit_totals: tables.audit_totals(),
        placing: placing::contents(&tables.place)?,
        now_ns: clock::monotonic_ns(),
    }))
}

fn service(contents: &ServiceContents, members: &[&Member], now: u64) -> ServiceSnapshot {
    let info = &contents.info;
    let quota = of_service(info);
    ServiceSnapshot {
        id: contents.id,
        name: text(&info.name),
        port: info.port,
        address: (!info.address.is_any()).then(|| info.address.into()),
        policy: Policy::from_number(info.policy),
        virtual_port: info.flags & ServicePort::VIRTUAL != 0,
        effect: effect(info.flags),
        rule: text(&info.rule),
        sentence: text(&info.sentence),
        keepalive: contents.keepalive.get(),
        quota_override: (info.by_hand == 1).then_some(info.quota_by_hand),
        unattributed: info.unattributed,
        backends: members
            .iter()
            .map(|member| BackendSnapshot {
                health: health(member, info.flags, now),
                ..backend(member, quota, now)
            })
            .collect(),
        down: Vec::new(),
        verdicts: contents.verdicts.clone(),
        warnings: Vec::new(),
    }
}

const fn effect(flags: u8) -> Effect {
    if flags & ServicePort::COUNT_ONLY != 0 {
        Effect::Count
    } else if flags & ServicePort::DRY_RUN != 0 {
        Effect::DryRun
    } else {
        Effect::On
    }
}

/// The backends of a service that are named and don't listen. A closed one with connections left
/// has a row of its own. What a cluster names only its daemon knows, for as long as it lives.
fn down(contents: &MapContents, of: &ServiceContents, members: &[&Member]) -> Vec<DownBackend> {
    let name = text(&of.info.name);
    let noted = contents.down.iter().filter(|note| note.service == name);
    let since: BTreeMap<SocketAddr, u64> =
        noted.map(|note| (note.address, note.since_ns)).collect();
    let addresses: BTreeSet<SocketAddr> = if of.info.flags & ServicePort::VIRTUAL != 0 {
        let listening: Vec<&Backend> = members.iter().map(|member| &member.backend).collect();
        let listed = contents.listed.get(&of.id);
        not_listened_on(listed.into_iter().flatten(), &listening)
    } else if daemon(contents).refuses {
        since.keys().copied().collect()
    } else {
        BTreeSet::new()
    };
    let age = |since_ns: &u64| Duration::from_nanos(contents.now_ns.saturating_sub(*since_ns));
    let backend = |address| DownBackend {
        address,
        since: since.get(&address).map(age),
    };
    addresses.into_iter().map(backend).collect()
}

fn daemon(contents: &MapContents) -> DaemonSnapshot {
    let beat = contents.heartbeat;
    let lived = beat.last_ns != 0;
    DaemonSnapshot {
        refuses: lived && !beat.is_stale(contents.now_ns),
        heartbeat_age: lived
            .then(|| Duration::from_nanos(contents.now_ns.saturating_sub(beat.last_ns))),
        fail_open_after: Duration::from_nanos(beat.limit_ns),
        audit_totals: contents.audit_totals,
    }
}

fn backend(member: &Member, of_service: InForce, now: u64) -> BackendSnapshot {
    let in_force = written(&member.policy, member.backend.slot_state()).unwrap_or(of_service);
    let steerable = member.backend.flags & Backend::UNSTEERABLE == 0;
    BackendSnapshot {
        slot: member.slot,
        address: SocketAddr::new(listen_address(&member.backend), member.backend.port),
        netns: member.backend.netns,
        state: member.state(),
        weight: member.weight(),
        quota: in_force.quota.limit(),
        overridden: in_force.source.is_by_hand(),
        server: server(member),
        established: member.counts.established(),
        exempt: member.counts.exempt(),
        pending: steerable.then(|| admission::expected(member.counts.expected, now)),
        silence: Silence::default(),
        drained: in_force.source == QuotaSource::Drained,
        moves: SlotMoves::default(),
        steerable,
        health: None,
        note: note(&member.backend),
    }
}

fn health(member: &Member, flags_of_service: u8, now: u64) -> Option<BackendHealth> {
    if flags_of_service & ServicePort::HEALTH_OFF != 0 || member.state() != BackendState::Active {
        return None;
    }
    let since = member.health.since(now);
    Some(BackendHealth {
        state: member.health.state(now),
        age: since.map_or(Duration::ZERO, |since| span_of(now.saturating_sub(since))),
    })
}

fn server(member: &Member) -> Option<ServerSnapshot> {
    let written = written_for_server(&member.policy, member.backend.slot_state())?;
    Some(ServerSnapshot {
        first_slot: member.policy.first_slot(),
        quota: written.quota.limit(),
    })
}

/// The address as the socket shows it: a wildcard of its own family.
pub fn listen_address(backend: &Backend) -> IpAddr {
    if backend.address.is_any() && backend.flags & Backend::V6 == 0 {
        return IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);
    }
    backend.address.into()
}

fn note(backend: &Backend) -> Option<String> {
    if backend.flags & Backend::UNSTEERABLE == 0 {
        return None;
    }
    let errno = nix::errno::Errno::from_raw(i32::try_from(backend.map_error).unwrap_or(0));
    Some(if errno == nix::errno::Errno::EOPNOTSUPP {
        "an MPTCP listener: counted and limited on its own port, but nothing can be steered to it (Go servers: GODEBUG=multipathtcp=0)".into()
    } else {
        format!(
            "nothing can be steered to it: the kernel refused its socket ({})",
            errno.desc()
        )
    })
}
