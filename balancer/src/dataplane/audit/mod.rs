//! The audit: the counts of the kernel half compared with the socket table, and put right where
//! they stay wrong.

mod adopt;
mod attribution;
mod compare;
mod connections;
mod handover;
mod inherited;
mod keepalive;
mod placed;
mod socket_table;
mod unattributed;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Result;
use balancer_common::abi::{AuditTotals, BackendId, BackendState, Counts};
use tracing::{info, warn};

pub use self::adopt::Known;
use self::adopt::{Adopter, Unregistered};
use self::attribution::Attribution;
pub use self::attribution::{adopted, fitting};
use self::compare::{Deviation, Drift, LASTING};
use self::connections::Connections;
pub use self::handover::Handover;
use self::inherited::Inherited;
use self::keepalive::LateKeepalive;
use self::placed::PlacedAudit;
use self::socket_table::{Reach, SocketTable};
use self::unattributed::Unattributed;
use super::plan::Rules;
use super::tables::{SlotView, Tables, backend_of};
use super::{services, slots};
use crate::sys::{clock, memory};

/// So many connections take megabytes while they are compared, which the process must not keep
/// until the next pass.
const MANY: usize = 10_000;

/// What the passes have found so far. One pass goes over all guarded netns, one after the other.
#[derive(Debug)]
pub struct Audit {
    /// The cgroup whose listeners are counted.
    cgroup: PathBuf,
    /// What other builds' data planes know of connections.
    handover: Handover,
    /// What processes tell of connections that are older than the data plane.
    attribution: Attribution,
    /// The connections that were given to slots.
    inherited: Inherited,
    /// Keepalive of connections that are older than the data plane.
    keepalive: LateKeepalive,
    /// Listeners that a rule claims and nobody has registered.
    unregistered: Unregistered,
    /// Whose listeners always get a slot.
    known: Known,
    /// The comparison of what this node has placed.
    pub placed: PlacedAudit,
    /// The ids of the services of which the log says how many connections nobody counts.
    warned: BTreeSet<u16>,
    /// The numbers for `status`, over all passes.
    totals: AuditTotals,
    /// The pass before this one.
    last: Pass,
    /// The pass that is under way.
    this: Pass,
}

/// What one pass saw that may be a socket on its way: only what the next one sees again is so.
#[derive(Debug, Default)]
struct Pass {
    /// Counts that differed from the socket table, by slot.
    deviations: BTreeMap<(u32, Count), Deviation>,
    /// Connections with a slot that are not counted, by their cookie, and how many passes in a row
    /// have seen them so.
    leaving: HashMap<u64, u64>,
    /// Backends whose listener was not there.
    without_listener: HashSet<BackendId>,
    /// By how many connections counts were put right.
    drift: u64,
    /// Whether there are adopted backends, or connections that the kernel half does not count.
    adopted: bool,
    /// The connections through virtual ports that nobody counts, by the service's id.
    unattributed: BTreeMap<u16, Unattributed>,
}

/// The two counts of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Count {
    Established,
    Exempt,
}

impl Audit {
    /// Goes on from what an earlier daemon has found, with what other builds have left.
    pub fn new(totals: AuditTotals, handover: Handover, cgroup: &Path) -> Self {
        Self {
            cgroup: cgroup.to_owned(),
            handover,
            attribution: Attribution::default(),
            inherited: Inherited::default(),
            keepalive: LateKeepalive::default(),
            unregistered: Unregistered::default(),
            known: Known::All,
            placed: PlacedAudit::default(),
            warned: BTreeSet::new(),
            totals,
            last: Pass::default(),
            this: Pass::default(),
        }
    }

    /// Other data planes are gone, and with them what they knew.
    pub fn end_handover(&mut self) {
        self.handover.close();
    }

    /// The cgroup whose listeners are counted.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// Says whose listeners always get a slot.
    pub fn know(&mut self, known: Known) {
        self.known = known;
    }

    /// Begins a pass.
    ///
    /// # Errors
    /// When a map can't be read.
    pub fn begin(&mut self, tables: &Tables) -> Result<()> {
        self.this = Pass::default();
        self.unregistered.begin(tables)
    }

    /// Looks at one netns: registers listeners that nobody has registered (where `eager`, at first
    /// sight), closes slots whose listeners are gone, and puts counts right that stay wrong. Must
    /// run inside that netns.
    ///
    /// # Errors
    /// When the socket table or a map can't be read.
    pub fn check(
        &mut self,
        tables: &mut Tables,
        rules: &Rules,
        netns: u64,
        eager: bool,
    ) -> Result<()> {
        let reach = self.reach(tables, rules, netns)?;
        let mut table = SocketTable::read(tables, netns, &reach)?;
        let mut adopter = Adopter {
            tables,
            rules,
            cgroup: &self.cgroup,
            netns,
            eager,
            known: &self.known,
            unregistered: &mut self.unregistered,
        };
        if adopter.adopt(&table)? {
            table = SocketTable::read(tables, netns, &reach)?;
        }
        if reach != Reach::All {
            self.close_without_listener(tables, &table);
            return Ok(());
        }
        let inherited = &mut self.inherited;
        if self.handover.inherit(tables, &table, inherited)? {
            table = SocketTable::read(tables, netns, &reach)?;
        }
        let attribution = &mut self.attribution;
        if attribution.attribute(tables, &table, netns, eager, inherited)? {
            table = SocketTable::read(tables, netns, &reach)?;
        }
        self.close_without_listener(tables, &table);
        let connections = Connections::sort(tables, &table, &self.inherited, &self.last.leaving);
        self.compare(tables, &table, &connections);
        self.note_unseen(&table, &connections);
        self.this.adopted |= connections.recount(
            tables,
            &table.slots,
            self.attribution.doubts(netns),
            &mut self.this.unattributed,
        )?;
        keepalive::note_silence(tables, &table, &connections);
        self.keepalive
            .turn_on(tables, &table, &connections, netns)?;
        self.this.leaving.extend(connections.leaving);
        if table.connections.len() >= MANY {
            drop(table);
            memory::give_back();
        }
        Ok(())
    }

    /// How much of a netns is looked at: of one that may be anybody's only the listeners, until one
    /// of them is known or confirmed.
    fn reach(&self, tables: &Tables, rules: &Rules, netns: u64) -> Result<Reach> {
        let is_named = rules.0.keys().any(|key| key.netns == netns);
        let is_confirmed = |view: &SlotView| {
            view.member.backend.netns == netns && view.state() != BackendState::Candidate
        };
        if is_named || self.known.is_everybody() || tables.slots()?.iter().any(is_confirmed) {
            return Ok(Reach::All);
        }
        let ports = rules
            .0
            .keys()
            .filter_map(|key| u16::try_from(key.port).ok());
        let ports: BTreeSet<u16> = ports.collect();
        let ports: Vec<u16> = ports.into_iter().collect();
        let listeners = Reach::Listeners(ports);
        let known = SocketTable::read(tables, netns, &listeners)?
            .listeners
            .iter()
            .any(|socket| self.known.has(socket));
        Ok(if known { Reach::All } else { listeners })
    }

    /// Ends a pass that took so much processor time; returns what is known now.
    ///
    /// # Errors
    /// When a map can't be read or changed.
    pub fn end(&mut self, tables: &mut Tables, cost: Duration) -> Result<AuditTotals> {
        self.unregistered.end(tables);
        self.publish_unattributed(tables)?;
        let repaired = self.placed.check()?;
        self.totals.repairs += repaired.counts;
        self.this.drift += repaired.connections;
        self.last = std::mem::take(&mut self.this);
        self.totals = AuditTotals {
            checks: self.totals.checks + 1,
            drift: self.last.drift,
            last_ns: clock::monotonic_ns(),
            cost_ns: u64::try_from(cost.as_nanos()).unwrap_or(u64::MAX),
            ..self.totals
        };
        tables.set_audit_totals(self.totals);
        Ok(self.totals)
    }

    /// Writes down of each service how many connections nobody counts; the first time, the log says
    /// why.
    fn publish_unattributed(&mut self, tables: &mut Tables) -> Result<()> {
        let found = &self.this.unattributed;
        for (name, id) in services::ids(tables)? {
            let of_service = found.get(&id);
            services::set_unattributed(tables, id, of_service.map_or(0, Unattributed::total))?;
            let Some(of_service) = of_service else {
                self.warned.remove(&id);
                continue;
            };
            if self.warned.insert(id) {
                warn!(
                    "{name}: {} established connections through its virtual port are older than \
                     this data plane and counted by nobody: {}. New clients may exceed the quota \
                     by as many, until these end or their server is started again",
                    of_service.total(),
                    of_service.reasons()
                );
            }
        }
        Ok(())
    }

    /// Whether the last pass saw something that only the next one can tell from a socket on its
    /// way.
    pub fn is_in_doubt(&self) -> bool {
        let last = &self.last;
        !(last.deviations.is_empty() && last.leaving.is_empty() && last.without_listener.is_empty())
            || self.placed.is_in_doubt()
    }

    /// Whether the last pass saw backends or connections that the kernel half does not see go.
    pub const fn has_adopted(&self) -> bool {
        self.last.adopted
    }

    /// Closes what is left of a netns that is gone, with all its sockets.
    ///
    /// # Errors
    /// When a map can't be read.
    pub fn drop_netns(&mut self, tables: &Tables, netns: u64) -> Result<()> {
        self.attribution.drop_netns(netns);
        self.keepalive.drop_netns(netns);
        for (view, left) in slots::close_netns(tables, netns)? {
            self.totals.repairs += 1;
            warn!(
                "{}: {left} connections were counted on it still when its network namespace was \
                 gone: put right",
                name(&view)
            );
        }
        Ok(())
    }

    /// A listener that closes is seen by the kernel half, but for adopted ones and where another
    /// program switches that off.
    fn close_without_listener(&mut self, tables: &Tables, table: &SocketTable) {
        let listening: HashSet<BackendId> = table.listeners.iter().filter_map(backend_of).collect();
        for view in &table.slots {
            let is_active = view.slot_state().is(BackendState::Active);
            if !is_active || listening.contains(&view.id()) {
                continue;
            }
            if self.last.without_listener.contains(&view.id()) {
                info!("{}: its listener is gone", name(view));
                slots::close(tables, view);
            } else {
                self.this.without_listener.insert(view.id());
            }
        }
    }

    /// A connection counts on the slot that its storage names, also one that was handed on to
    /// another listener (`tcp_migrate_req`): there it stays until it ends.
    fn compare(&mut self, tables: &Tables, table: &SocketTable, connections: &Connections<'_>) {
        let readings = table.before.iter().zip(&table.after);
        for (view, (before, after)) in table.slots.iter().zip(readings) {
            if before.generation != after.generation {
                continue;
            }
            let entered = after.entered.wrapping_sub(before.entered);
            let found = connections.counted.get(&view.slot());
            let (found, found_exempt) = found.copied().unwrap_or_default();
            let drift = |count: fn(&Counts) -> u32, found| {
                Drift::between(count(&before.counts), count(&after.counts), entered, found)
            };
            let established = drift(Counts::established, found);
            let exempt = drift(Counts::exempt, found_exempt);
            let established = self.lasting(view, Count::Established, established);
            let exempt = self.lasting(view, Count::Exempt, exempt);
            if established != 0 || exempt != 0 {
                self.repair(tables, view, established, exempt, found);
            }
        }
    }

    /// By how much a count has been off for long enough; 0: it may be right.
    fn lasting(&mut self, view: &SlotView, count: Count, drift: Drift) -> i64 {
        if drift.may_be_none() {
            return 0;
        }
        let key = (view.slot(), count);
        let before = self.last.deviations.get(&key).copied();
        let deviation = Deviation::seen_again(before, view.slot_state().generation(), drift);
        deviation.lasting().unwrap_or_else(|| {
            self.this.deviations.insert(key, deviation);
            0
        })
    }

    fn repair(
        &mut self,
        tables: &Tables,
        view: &SlotView,
        established: i64,
        exempt: i64,
        found: u32,
    ) {
        let change = established
            .cast_unsigned()
            .wrapping_add(exempt.cast_unsigned() << 32);
        let word = tables.established_word(view.slot());
        word.fetch_add(change, Ordering::SeqCst);
        self.note_repair(established.unsigned_abs().max(exempt.unsigned_abs()));
        warn!(
            "{}: the socket table has {found} connections, {established:+} ({exempt:+} exempt) \
             against the count, for {LASTING} comparisons now: put right. Another sock_ops program \
             may switch state changes off (`balancer doctor` names them)",
            name(view)
        );
    }

    fn note_repair(&mut self, drift: u64) {
        self.totals.repairs += 1;
        self.this.drift += drift;
    }

    /// Connections whose entry the kernel half didn't see are counted from the socket table from
    /// now on, which puts a count right, too.
    fn note_unseen(&mut self, table: &SocketTable, connections: &Connections<'_>) {
        for view in &table.slots {
            let Some(unseen) = connections.unseen.get(&view.slot()) else {
                continue;
            };
            self.note_repair(*unseen);
            warn!(
                "{}: the socket table has {unseen:+} connections that came unseen: put right, they \
                 are counted from it from now on. Another sock_ops program may switch state changes \
                 off (`balancer doctor` names them)",
                name(view)
            );
        }
    }
}

/// How a log calls a backend.
fn name(view: &SlotView) -> String {
    let backend = &view.member.backend;
    let address = SocketAddr::new(backend.address.into(), backend.port);
    format!("backend {address} (slot {})", view.slot())
}
