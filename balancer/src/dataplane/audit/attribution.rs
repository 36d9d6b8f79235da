//! Whose the connections are that are older than the data plane, where addresses do not tell: all
//! of a virtual port have its address, and all of a `SO_REUSEPORT` group have the group's. The
//! processes that hold a connection tell, by the listeners that they hold.

use std::collections::{BTreeSet, HashMap};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use balancer_common::abi::{
    Address, Backend, BackendId, BackendState, Connection, PortKey, ServicePort,
};

use super::super::tables::{SlotView, Tables, backend_of};
use super::inherited::Inherited;
use super::socket_table::{SocketTable, bound_to};
use super::unattributed::Why;
use crate::discover::{Owners, SocketOwner, owners};
use crate::sys::sock_diag::{Family, Socket};

/// When connections are tried again that their processes leave open: that takes a look at every
/// process.
const RETRY_AFTER: Duration = Duration::from_secs(60);

/// What the processes of each netns, by its cookie, leave open.
#[derive(Debug, Default)]
pub struct Attribution(HashMap<u64, Doubts>);

/// The connections of a netns that its processes leave open.
#[derive(Debug, Default)]
pub struct Doubts {
    /// By the cookie of the connection.
    connections: HashMap<u64, Doubt>,
    /// When the processes are looked at again; `None`: they never were.
    retry_at: Option<Instant>,
}

/// A connection that its processes leave open.
#[derive(Clone, Debug)]
pub struct Doubt {
    /// The service through whose virtual port it came; `None`: it has the address of listeners.
    pub service: Option<u16>,
    /// Why it is not known whose it is.
    pub why: Why,
    /// The slots of the listeners that its processes hold, as far as it may have come from them.
    pub slots: Vec<u32>,
    /// A process that holds it.
    pub pid: Option<u32>,
}

impl Doubts {
    /// What is known of a connection.
    pub fn of(&self, socket: &Socket) -> Option<&Doubt> {
        self.connections.get(&socket.cookie)
    }

    /// Whether the processes may tell more of a connection than they have.
    fn is_due(&self, socket: &Socket) -> bool {
        let is_accepted = socket.inode != 0;
        let retry = self.retry_at.is_none_or(|retry| retry <= Instant::now());
        let known = self.of(socket);
        is_accepted && (retry || known.is_none_or(|doubt| doubt.why == Why::Unaccepted))
    }

    /// Keeps what is known of these, and nothing else.
    fn keep(&mut self, cases: &[Case<'_>]) {
        let known = |case: &Case<'_>| {
            let doubt = self.of(case.socket).cloned();
            let doubt = doubt.unwrap_or_else(|| case.doubt(Why::Unaccepted));
            (case.socket.cookie, doubt)
        };
        self.connections = cases.iter().map(known).collect();
    }
}

/// A connection that several backends may have.
struct Case<'a> {
    socket: &'a Socket,
    /// The service through whose virtual port it came; `None`: it has the address of listeners.
    service: Option<u16>,
}

impl Case<'_> {
    const fn doubt(&self, why: Why) -> Doubt {
        Doubt {
            service: self.service,
            why,
            slots: Vec::new(),
            pid: None,
        }
    }
}

impl Attribution {
    /// What is left open in a netns.
    pub fn doubts(&self, netns: u64) -> Option<&Doubts> {
        self.0.get(&netns)
    }

    /// A netns is gone.
    pub fn drop_netns(&mut self, netns: u64) {
        self.0.remove(&netns);
    }

    /// Gives each connection that its processes tell the backend of to that backend; says whether
    /// there was any. Must run inside the netns, after its listeners were adopted.
    ///
    /// Where `eager`, connections through virtual ports are looked for. Those that come later have
    /// a storage: what then has none, and a virtual port for its own, was opened from here.
    ///
    /// # Errors
    /// When a map or the processes can't be read.
    pub fn attribute(
        &mut self,
        tables: &Tables,
        table: &SocketTable,
        netns: u64,
        eager: bool,
        inherited: &mut Inherited,
    ) -> Result<bool> {
        let ports = eager.then(|| Ports::read(tables)).transpose()?;
        let doubts = self.0.entry(netns).or_default();
        let service = |socket: &Socket| match &ports {
            Some(ports) => ports.virtual_service(socket.local),
            None => doubts.of(socket)?.service,
        };
        let open =
            |socket: &&Socket| socket.storage.is_none() && inherited.connection(socket).is_none();
        let connections = table.connections.iter().filter(open);
        let cases = cases(tables, table, connections, service);
        let is_due = |case: &Case<'_>| doubts.is_due(case.socket);
        if !cases
            .iter()
            .any(|case| case.socket.inode != 0 && (eager || is_due(case)))
        {
            doubts.keep(&cases);
            return Ok(false);
        }
        let holders = Holders::look(tables, table, &cases)?;
        let mut given = Vec::new();
        doubts.connections.clear();
        doubts.retry_at = Some(Instant::now() + RETRY_AFTER);
        for case in &cases {
            match holders.backend_of(case) {
                Ok(connection) => given.push((case.socket, connection)),
                Err(doubt) => drop(doubts.connections.insert(case.socket.cookie, doubt)),
            }
        }
        inherited.give(tables, &given, &holders.owners);
        Ok(!given.is_empty())
    }
}

/// Those of the connections that several backends may have. Where nothing listens for the service,
/// nobody cares about its port.
fn cases<'a>(
    tables: &Tables,
    table: &SocketTable,
    connections: impl Iterator<Item = &'a Socket>,
    service: impl Fn(&Socket) -> Option<u16>,
) -> Vec<Case<'a>> {
    let adopted = adopted(tables, &table.slots);
    let serves = |service: &u16| {
        let mut services = table.slots.iter().map(|view| view.member.backend.service);
        services.any(|other| other == *service)
    };
    let case = |socket: &'a Socket| {
        let service = service(socket).filter(serves);
        let is_open = service.is_some() || fitting(&adopted, socket.local).len() > 1;
        is_open.then_some(Case { socket, service })
    };
    connections.filter_map(case).collect()
}

/// Who holds what.
struct Holders<'a> {
    owners: Owners,
    /// The backends whose listeners a process holds, by its number.
    backends: HashMap<u32, Vec<(Family, &'a SlotView)>>,
    adopted: Vec<&'a SlotView>,
}

impl<'a> Holders<'a> {
    fn look(tables: &Tables, table: &'a SocketTable, cases: &[Case<'_>]) -> Result<Self> {
        let views: HashMap<_, _> = table.slots.iter().map(|view| (view.id(), view)).collect();
        let listener = |socket: &'a Socket| Some((socket, *views.get(&backend_of(socket)?)?));
        let listeners: Vec<_> = table.listeners.iter().filter_map(listener).collect();
        let inodes = listeners.iter().map(|(socket, _)| socket.inode);
        let owners = owners(inodes.chain(cases.iter().map(|case| case.socket.inode)))
            .context("cannot look at the processes")?;
        let mut backends: HashMap<u32, Vec<(Family, &SlotView)>> = HashMap::new();
        for (socket, view) in listeners {
            for owner in owners.get(&socket.inode).into_iter().flatten() {
                backends
                    .entry(owner.pid)
                    .or_default()
                    .push((socket.family, view));
            }
        }
        Ok(Self {
            owners,
            backends,
            adopted: adopted(tables, &table.slots),
        })
    }

    /// The backend whose listener the processes of a connection hold, if that is one.
    fn backend_of(&self, case: &Case<'_>) -> Result<Connection, Doubt> {
        if case.socket.inode == 0 {
            return Err(case.doubt(Why::Unaccepted));
        }
        let Some(owners) = self.owners.get(&case.socket.inode) else {
            return Err(case.doubt(Why::Hidden));
        };
        let held = self.held(case, owners);
        if let [id] = held.as_slice()
            && let Ok(slot) = u16::try_from(id.slot)
        {
            return Ok(Connection {
                slot,
                class: Connection::INHERITED,
                generation: id.generation,
            });
        }
        let why = if held.is_empty() {
            Why::NoListener
        } else {
            Why::Several
        };
        Err(Doubt {
            slots: held.iter().map(|id| id.slot).collect(),
            pid: owners.first().map(|owner| owner.pid),
            ..case.doubt(why)
        })
    }

    /// The backends whose listeners these processes hold, those that a connection may have come
    /// from. An accepted socket is of the family of its listener.
    fn held(&self, case: &Case<'_>, owners: &[SocketOwner]) -> Vec<BackendId> {
        let fitting = fitting(&self.adopted, case.socket.local);
        let may_be = |view: &SlotView| match case.service {
            Some(service) => view.member.backend.service == service,
            None => fitting.iter().any(|other| other.slot() == view.slot()),
        };
        let backends = owners
            .iter()
            .filter_map(|owner| self.backends.get(&owner.pid));
        let of_family = backends
            .flatten()
            .filter(|(family, _)| *family == case.socket.family);
        let held: BTreeSet<BackendId> = of_family
            .filter(|(_, view)| may_be(view))
            .map(|(_, view)| view.id())
            .collect();
        held.into_iter().collect()
    }
}

/// What is known of ports that clients connect to.
struct Ports(HashMap<PortKey, ServicePort>);

impl Ports {
    fn read(tables: &Tables) -> Result<Self> {
        let entries = tables.services.iter();
        let entries = entries.map(|entry| entry.map(|(key, port)| (key.0, port.0)));
        let entries = entries.collect::<Result<_, _>>();
        entries.map(Self).context("cannot read SERVICES")
    }

    /// The service on whose virtual port a connection came, as the kernel half tells it.
    fn virtual_service(&self, local: SocketAddr) -> Option<u16> {
        let lookup = |key: &PortKey| Ok::<_, Infallible>(self.0.get(key).copied());
        let Ok(found) = ServicePort::of_destination(|| bound_to(local.ip()), local.port(), lookup);
        let found = found.filter(|port| port.flags & ServicePort::VIRTUAL != 0);
        found.map(|port| port.service)
    }
}

/// The slots that may have connections without storage: the daemon has registered their listeners,
/// or has confirmed them after it had given them up.
pub fn adopted<'a>(tables: &Tables, slots: &'a [SlotView]) -> Vec<&'a SlotView> {
    let is_adopted = |view: &&SlotView| {
        view.member.backend.flags & Backend::ADOPTED != 0
            || (tables.is_disowned(view) && view.state() != BackendState::Candidate)
    };
    slots.iter().filter(is_adopted).collect()
}

/// The adopted listeners that a connection with that local address can have come from: those of the
/// exact address, else those of the wildcard.
pub fn fitting<'a>(adopted: &[&'a SlotView], local: SocketAddr) -> Vec<&'a SlotView> {
    let local_address = bound_to(local.ip());
    let of = |fits: &dyn Fn(Address) -> bool| -> Vec<&'a SlotView> {
        let fits = |view: &&'a SlotView| {
            let backend = &view.member.backend;
            backend.port == local.port() && fits(backend.address)
        };
        adopted.iter().copied().filter(fits).collect()
    };
    let exact = of(&|address| address == local_address);
    if exact.is_empty() {
        of(&|address| address.is_any())
    } else {
        exact
    }
}
