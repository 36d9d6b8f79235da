//! The daemon's side: load, attach, adopt, replace, change.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use aya::Ebpf;
use aya::maps::lpm_trie::Key;
use aya::maps::{MapData, MapError};
use aya::programs::CgroupAttachMode;
use aya::programs::links::FdLink;
use balancer_common::abi::{
    BackendState, Heartbeat, ListenRule, MAX_SERVICES, PortKey, ServiceInfo, ServicePort,
    SlotPolicy, UNLIMITED,
};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use tracing::{debug, info, warn};

use super::Paths;
use super::events::{self, Events};
use super::load::{self, Kernel, check_pins};
use super::lock::{Held, Lock};
use super::plan::{Plan, ServicePlan, rule_of};
use super::snapshot::{services, text};
use super::tables::{SlotView, Tables};
use super::wire::Wire;
use crate::discover::ensure_bpffs;
use crate::sys::{bpf, clock};

/// A closed slot is given away only after so long without a connection: a last one may be on its way out.
const QUARANTINE: Duration = Duration::from_secs(1);

/// How many ids there are for services.
#[expect(
    clippy::cast_possible_truncation,
    reason = "a constant far below 65,536"
)]
const SERVICE_IDS: u16 = MAX_SERVICES as u16;

/// The quota and weight of one backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotQuota {
    /// Its slot.
    pub slot: u32,
    /// The tenant that it is meant for.
    pub generation: u32,
    /// The quota; `None`: unlimited.
    pub quota: Option<u32>,
    /// Its weight.
    pub weight: u32,
    /// Where the quota comes from.
    pub source: QuotaSource,
}

/// Where a quota comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuotaSource {
    /// The service's rule.
    Rule,
    /// Set by hand for every backend of the service.
    Service,
    /// Set by hand for this backend.
    Backend,
}

impl QuotaSource {
    const fn flags(self) -> u32 {
        match self {
            Self::Rule => 0,
            Self::Service => SlotPolicy::SERVICE_BY_HAND,
            Self::Backend => SlotPolicy::BY_HAND,
        }
    }
}

/// The one writer of a data plane.
pub struct Writer {
    paths: Paths,
    kernel: Kernel,
    pub(super) tables: Tables,
    /// The cgroup whose listeners are counted.
    pub(super) cgroup: PathBuf,
    pub(super) rules: BTreeMap<PortKey, ListenRule>,
    /// Since when a closed slot has been seen without connections.
    empty_since: BTreeMap<u32, (u32, Instant)>,
    /// The loaded objects: they own the kernel half's log buffers.
    objects: Vec<Ebpf>,
    adopted: bool,
    _lock: Lock,
}

impl Writer {
    /// Takes the right to write, making the state directory where it is missing.
    ///
    /// # Errors
    /// When another process has it, or the directory can't be made.
    pub fn lock(paths: &Paths) -> Result<Lock> {
        lock(paths)
    }

    /// Makes a data plane, or adopts the one that is there; attaches `account` to the cgroup.
    ///
    /// # Errors
    /// When the pins are of another build, or the kernel refuses something. Nothing is
    /// left behind then that was not there before.
    pub fn start(
        paths: Paths,
        lock: Lock,
        cgroup: &Path,
        heartbeat_limit: Duration,
    ) -> Result<Self> {
        let kernel = Kernel::read()?;
        remove_directory(&paths.staging())?;
        let directory = paths.current();
        let adopted = directory.exists();
        let working = if adopted {
            directory.clone()
        } else {
            paths.staging()
        };
        if adopted {
            check_pins(&directory)?;
        } else {
            make_directory(&working)?;
        }
        let started = Self::attach_account(&kernel, &working, cgroup, heartbeat_limit);
        let (object, tables) = match started {
            Ok(started) => started,
            Err(error) => {
                if !adopted {
                    remove_directory(&working)?;
                }
                return Err(error);
            }
        };
        if !adopted {
            renameat2(
                AT_FDCWD,
                &working,
                AT_FDCWD,
                &directory,
                RenameFlags::RENAME_NOREPLACE,
            )
            .with_context(|| {
                format!(
                    "cannot rename {} to {}",
                    working.display(),
                    directory.display()
                )
            })?;
        }
        info!(
            "{} the data plane in {}",
            if adopted { "adopted" } else { "made" },
            directory.display()
        );
        Ok(Self {
            paths,
            kernel,
            tables,
            cgroup: cgroup.to_owned(),
            rules: BTreeMap::new(),
            empty_since: BTreeMap::new(),
            objects: vec![object],
            adopted,
            _lock: lock,
        })
    }

    fn attach_account(
        kernel: &Kernel,
        directory: &Path,
        cgroup: &Path,
        limit: Duration,
    ) -> Result<(Ebpf, Tables)> {
        let mut object = kernel.open_object(directory, 0)?;
        let tables = Tables::open(directory)?;
        tables.beat(beat(limit));
        let target = fs::File::open(cgroup)
            .with_context(|| format!("cannot open the cgroup {}", cgroup.display()))?;
        let id = target
            .metadata()
            .with_context(|| format!("cannot query the cgroup {}", cgroup.display()))?
            .ino();
        let program = load::account(&mut object)?;
        let pin = Paths::account(directory, id);
        if pin.exists() {
            replace(&pin, program.fd()?.as_fd())?;
        } else {
            let link = program.attach(&target, CgroupAttachMode::Single).with_context(|| {
                format!(
                    "cannot attach `account` to the cgroup {} (is it a cgroup2 directory? EPERM: an older program sits \
                     there that allows no other; `balancer doctor` names it)",
                    cgroup.display()
                )
            })?;
            let link: FdLink = program.take_link(link)?.try_into()?;
            link.pin(&pin)
                .with_context(|| format!("cannot pin {}", pin.display()))?;
        }
        remove_other_pins(directory, |path| {
            Paths::cgroup_of(path).is_some_and(|other| other != id)
        })?;
        Ok((object, tables))
    }

    /// Attaches `steer` to a network namespace, or replaces the one that is there.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn guard(&mut self, netns: BorrowedFd<'_>, cookie: u64) -> Result<()> {
        let directory = self.paths.current();
        let mut object = self.kernel.open_object(&directory, cookie)?;
        let program = load::steer(&mut object)?;
        let pin = Paths::steer(&directory, cookie);
        if pin.exists() {
            replace(&pin, program.fd()?.as_fd())?;
        } else {
            let link = program.attach(netns).with_context(|| {
                format!("cannot attach `steer` to the network namespace with cookie {cookie} (at most 64 programs a namespace)")
            })?;
            let link: FdLink = program.take_link(link)?.into();
            link.pin(&pin)
                .with_context(|| format!("cannot pin {}", pin.display()))?;
        }
        self.objects.push(object);
        Ok(())
    }

    /// Whether `steer` is attached to a namespace.
    pub fn guards(&self, cookie: u64) -> bool {
        Paths::steer(&self.paths.current(), cookie).exists()
    }

    /// Detaches `steer` from every namespace that is not wanted.
    ///
    /// # Errors
    /// When a pin can't be removed.
    pub fn unguard_others(&self, wanted: &HashSet<u64>) -> Result<()> {
        remove_other_pins(&self.paths.current(), |path| {
            Paths::netns_of(path).is_some_and(|cookie| !wanted.contains(&cookie))
        })
    }

    /// Passes on what the kernel half of the programs loaded since the last call logs. Must be called inside a runtime.
    pub fn follow_logs(&mut self) {
        self.objects.drain(..).for_each(events::follow_log);
    }

    /// The events of the kernel half. Must be called inside a runtime.
    ///
    /// # Errors
    /// When the ring can't be opened.
    pub fn events(&self) -> Result<Events> {
        Events::open(&self.paths.current())
    }

    /// Whether the data plane was there before.
    pub const fn adopted(&self) -> bool {
        self.adopted
    }

    /// The weight of a slot by the rules in force.
    pub fn weight_of(&self, view: &SlotView) -> u32 {
        let backend = &view.member.backend;
        rule_of(&self.rules, backend.netns, backend.address, backend.port)
            .map_or(backend.weight, |rule| rule.weight)
    }

    /// The daemon lives.
    pub fn beat(&self, limit: Duration) {
        self.tables.beat(beat(limit));
    }

    /// Puts a plan in force. New sources and listeners first, ports last, so that no SYN is judged by half of it.
    ///
    /// # Errors
    /// When a map can't be changed.
    pub fn apply(&mut self, plan: &Plan) -> Result<()> {
        let ids = self.assign_ids(plan)?;
        let by_hand = ids
            .iter()
            .map(|id| self.quota_by_hand(*id))
            .collect::<Result<Vec<_>>>()?;
        for (service, id) in plan.services.iter().zip(&ids) {
            self.write_info(*id, service)?;
        }
        self.apply_exempt(plan, &ids)?;
        let rules = plan.rules(&ids);
        sync(&mut self.tables.rules, &rules, "LISTEN_RULES")?;
        sync(
            &mut self.tables.services,
            &plan.ports(&ids, &by_hand),
            "SERVICES",
        )?;
        self.rules = rules;
        self.retire_services(&ids)?;
        self.close_strangers()
    }

    /// Writes the ports again after a quota by hand has changed.
    ///
    /// # Errors
    /// When a map can't be changed.
    pub fn refresh_ports(&mut self, plan: &Plan) -> Result<()> {
        let ids = self.assign_ids(plan)?;
        let by_hand = ids
            .iter()
            .map(|id| self.quota_by_hand(*id))
            .collect::<Result<Vec<_>>>()?;
        sync(
            &mut self.tables.services,
            &plan.ports(&ids, &by_hand),
            "SERVICES",
        )
    }

    /// A service keeps its id by its name, over reloads and restarts.
    fn assign_ids(&mut self, plan: &Plan) -> Result<Vec<u16>> {
        let mut names: BTreeMap<String, u16> = BTreeMap::new();
        let mut used = HashSet::new();
        for id in 0..SERVICE_IDS {
            let info = self.info(id)?;
            if info.name[0] != 0 {
                names.insert(text(&info.name), id);
                used.insert(id);
            }
        }
        let mut ids = Vec::new();
        for service in &plan.services {
            let id = match names.get(&service.name) {
                Some(id) => *id,
                None => self.new_id(&mut used)?,
            };
            ids.push(id);
        }
        Ok(ids)
    }

    fn new_id(&mut self, used: &mut HashSet<u16>) -> Result<u16> {
        let Some(id) = (0..SERVICE_IDS).find(|id| !used.contains(id)) else {
            bail!(
                "all {MAX_SERVICES} service ids are in use (services that were removed keep theirs until their last \
                 connection is gone)"
            );
        };
        used.insert(id);
        self.tables.forget_service(id)?;
        Ok(id)
    }

    fn info(&self, id: u16) -> Result<ServiceInfo> {
        Ok(self
            .tables
            .info
            .get(&u32::from(id), 0)
            .context("cannot read the services")?
            .0)
    }

    fn set_info(&mut self, id: u16, info: &ServiceInfo) -> Result<()> {
        self.tables
            .info
            .set(u32::from(id), Wire(*info), 0)
            .context("cannot write the services")
    }

    fn write_info(&mut self, id: u16, service: &ServicePlan) -> Result<()> {
        let old = self.info(id)?;
        let info = ServiceInfo {
            name: padded(&service.name),
            rule: padded(&service.rule),
            address: service
                .address
                .map_or(balancer_common::abi::Address::ANY, Into::into),
            port: service.port,
            policy: service.policy as u8,
            flags: if service.virtual_port {
                ServicePort::VIRTUAL
            } else {
                0
            },
            quota: service.quota.unwrap_or(UNLIMITED),
            ..old
        };
        if info == old {
            Ok(())
        } else {
            self.set_info(id, &info)
        }
    }

    /// Explains a service's quotas.
    ///
    /// # Errors
    /// When the map can't be changed.
    pub fn write_sentence(&mut self, id: u16, sentence: &str) -> Result<()> {
        let old = self.info(id)?;
        let info = ServiceInfo {
            sentence: padded(sentence),
            ..old
        };
        if info == old {
            Ok(())
        } else {
            self.set_info(id, &info)
        }
    }

    /// The quota set by hand for every backend of a service.
    ///
    /// # Errors
    /// When the map can't be read.
    pub fn quota_by_hand(&self, id: u16) -> Result<Option<u32>> {
        let info = self.info(id)?;
        Ok((info.by_hand == 1).then_some(info.quota_by_hand))
    }

    /// Sets or clears it.
    ///
    /// # Errors
    /// When the map can't be changed.
    pub fn set_quota_by_hand(&mut self, id: u16, quota: Option<u32>) -> Result<()> {
        let info = self.info(id)?;
        self.set_info(
            id,
            &ServiceInfo {
                by_hand: u32::from(quota.is_some()),
                quota_by_hand: quota.unwrap_or(0),
                ..info
            },
        )
    }

    /// The services by name.
    ///
    /// # Errors
    /// When the map can't be read.
    pub fn service_ids(&self) -> Result<BTreeMap<String, u16>> {
        Ok(services(&self.tables)?
            .into_iter()
            .map(|(id, info)| (text(&info.name), id))
            .collect())
    }

    /// All taken slots.
    ///
    /// # Errors
    /// When a map can't be read.
    pub fn slots(&self) -> Result<Vec<SlotView>> {
        self.tables.slots()
    }

    /// Gives a backend its quota and weight, in force at the next SYN.
    pub fn set_quota(&self, wanted: SlotQuota) {
        let quota = wanted.quota.unwrap_or(UNLIMITED);
        let policy = SlotPolicy::new(
            wanted.generation,
            quota,
            wanted.weight,
            wanted.source.flags(),
        );
        let present = self.tables.policy(wanted.slot);
        if (present.quota, present.weight) == (policy.quota, policy.weight) {
            return;
        }
        // The quota's word carries the generation that makes both valid: it goes last.
        self.tables
            .weight_word(wanted.slot)
            .store(policy.weight, Ordering::SeqCst);
        self.tables
            .quota_word(wanted.slot)
            .store(policy.quota, Ordering::SeqCst);
    }

    fn apply_exempt(&mut self, plan: &Plan, ids: &[u16]) -> Result<()> {
        let wanted = plan.exempt(ids);
        let present: Vec<_> = self
            .tables
            .exempt
            .keys()
            .collect::<Result<_, _>>()
            .context("cannot read EXEMPT")?;
        for ((bits, key), class) in &wanted {
            self.tables
                .exempt
                .insert(&Key::new(*bits, Wire(*key)), class, 0)
                .context("cannot add an exempt network")?;
        }
        for key in present {
            if !wanted.contains_key(&(key.prefix_len(), key.data().0)) {
                self.tables
                    .exempt
                    .remove(&key)
                    .context("cannot remove an exempt network")?;
            }
        }
        Ok(())
    }

    /// Services that are no longer configured lose their name once their last slot is free, and their ports at once.
    fn retire_services(&mut self, ids: &[u16]) -> Result<()> {
        let busy: HashSet<u16> = self
            .slots()?
            .iter()
            .map(|view| view.member.backend.service)
            .collect();
        for id in 0..SERVICE_IDS {
            let info = self.info(id)?;
            if info.name[0] == 0 || ids.contains(&id) {
                continue;
            }
            let retired = if busy.contains(&id) {
                ServiceInfo { port: 0, ..info }
            } else {
                EMPTY_INFO
            };
            if retired != info {
                info!("service {} is no longer configured", text(&info.name));
                self.set_info(id, &retired)?;
            }
        }
        Ok(())
    }

    /// Listeners that no rule claims any more get no SYNs; what they hold is counted on.
    fn close_strangers(&mut self) -> Result<()> {
        for view in self.slots()? {
            let backend = &view.member.backend;
            let rule = rule_of(&self.rules, backend.netns, backend.address, backend.port);
            if view.life().is(BackendState::Active)
                && rule.is_none_or(|rule| rule.service != backend.service)
            {
                warn!(
                    "slot {}: the listener on port {} is no longer a backend; if another service wants it, it must listen anew",
                    view.slot(),
                    backend.port
                );
                self.close(&view);
            }
        }
        Ok(())
    }

    pub(super) fn close(&mut self, view: &SlotView) {
        let life = view.life();
        let closed = life.with(BackendState::Closed).0;
        let word = self.tables.life(view.slot());
        if word
            .compare_exchange(life.0, closed, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
        {
            self.tables.leave(view.member.backend.service, view.slot());
        }
    }

    /// Frees the closed slots that have had no connection for a while; returns them.
    ///
    /// # Errors
    /// When a map can't be read or changed.
    pub fn free_empty(&mut self) -> Result<Vec<SlotView>> {
        let now = Instant::now();
        let empty: Vec<SlotView> = self
            .slots()?
            .into_iter()
            .filter(|view| {
                view.life().is(BackendState::Closed) && view.member.counts.established == 0
            })
            .collect();
        let slots: HashSet<u32> = empty.iter().map(SlotView::slot).collect();
        self.empty_since.retain(|slot, _| slots.contains(slot));
        let mut freed = Vec::new();
        for view in empty {
            let generation = view.life().generation();
            let (seen, since) = *self
                .empty_since
                .entry(view.slot())
                .or_insert((generation, now));
            if seen != generation {
                self.empty_since.insert(view.slot(), (generation, now));
            } else if now.duration_since(since) >= QUARANTINE && self.free(&view)? {
                self.empty_since.remove(&view.slot());
                freed.push(view);
            }
        }
        Ok(freed)
    }

    fn free(&mut self, view: &SlotView) -> Result<bool> {
        match self.tables.listeners.clear_index(&view.slot()) {
            Ok(()) => debug!("slot {}: its listener was still in the map", view.slot()),
            Err(MapError::SyscallError(error)) if not_there(&error.io_error) => {}
            Err(MapError::KeyNotFound | MapError::ElementNotFound) => {}
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("cannot clear the listener of slot {}", view.slot()));
            }
        }
        let life = view.life();
        let free =
            balancer_common::abi::Life::new(life.generation().wrapping_add(1), BackendState::Free);
        let word = self.tables.life(view.slot());
        Ok(word
            .compare_exchange(life.0, free.0, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok())
    }

    /// Takes everything out of the kernel.
    ///
    /// # Errors
    /// When a pin can't be removed.
    pub fn remove(&self) -> Result<()> {
        remove_data_plane(&self.paths)
    }
}

const EMPTY_INFO: ServiceInfo = ServiceInfo {
    name: [0; 64],
    rule: [0; 128],
    sentence: [0; 256],
    address: balancer_common::abi::Address::ANY,
    quota_by_hand: 0,
    by_hand: 0,
    port: 0,
    policy: 0,
    flags: 0,
    quota: 0,
};

/// Takes the data plane of a state directory out of the kernel; false: there was none.
///
/// # Errors
/// When a daemon holds it, or a pin can't be removed.
pub fn unload(paths: &Paths) -> Result<bool> {
    if !paths.state_dir().exists() {
        return Ok(false);
    }
    let there = paths.current().exists() || paths.staging().exists();
    match Lock::take(paths)? {
        Held::Mine(lock) => {
            remove_data_plane(paths)?;
            drop(lock);
            Ok(there)
        }
        Held::ByOther(pid) => bail!(
            "the data plane in {} is held by {}, which does not answer on its admin socket: end that process first",
            paths.state_dir().display(),
            holder(pid)
        ),
    }
}

fn holder(pid: Option<u32>) -> String {
    pid.map_or_else(
        || "another process".to_owned(),
        |pid| format!("process {pid}"),
    )
}

fn lock(paths: &Paths) -> Result<Lock> {
    if ensure_bpffs(paths.state_dir())? {
        info!("mounted the BPF file system");
    }
    make_directory(paths.state_dir())?;
    match Lock::take(paths)? {
        Held::Mine(lock) => Ok(lock),
        Held::ByOther(pid) => bail!(
            "the data plane in {} already has a daemon: {} (a second one needs a --state-dir of its own)",
            paths.state_dir().display(),
            holder(pid)
        ),
    }
}

fn beat(limit: Duration) -> Heartbeat {
    Heartbeat {
        last_ns: clock::monotonic_ns(),
        limit_ns: u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX),
    }
}

/// Replaces the program of a pinned link, without a moment in which there is none.
fn replace(pin: &Path, program: BorrowedFd<'_>) -> Result<()> {
    let link = bpf::obj_get(pin)
        .with_context(|| format!("cannot open the pinned link {}", pin.display()))?;
    bpf::link_update(&link, program).with_context(|| {
        format!("cannot replace the program of {} (the namespace or cgroup may be gone: `balancer unload` clears it)", pin.display())
    })
}

fn make_directory(path: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| {
            format!(
                "cannot make the directory {} (are we root?)",
                path.display()
            )
        })
}

/// The pins first that attach something, so that nothing runs on half of its maps.
fn remove_directory(directory: &Path) -> Result<()> {
    let mut pins: Vec<PathBuf> = match fs::read_dir(directory) {
        Ok(entries) => entries
            .map(|entry| Ok(entry?.path()))
            .collect::<std::io::Result<_>>(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => Err(error),
    }
    .with_context(|| format!("cannot list {}", directory.display()))?;
    pins.sort_by_key(|path| {
        (
            Paths::netns_of(path).is_none(),
            Paths::cgroup_of(path).is_none(),
        )
    });
    for pin in pins {
        if Paths::netns_of(&pin).is_some() || Paths::cgroup_of(&pin).is_some() {
            detach(&pin)?;
        }
        remove_pin(&pin)?;
    }
    fs::remove_dir(directory)
        .with_context(|| format!("cannot remove the directory {}", directory.display()))
}

fn remove_data_plane(paths: &Paths) -> Result<()> {
    remove_directory(&paths.current())?;
    remove_directory(&paths.staging())?;
    match fs::remove_dir(paths.state_dir()) {
        Ok(()) => Ok(()),
        // Another layout's pins, or somebody's own files, are not ours to remove.
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::DirectoryNotEmpty | ErrorKind::NotFound
            ) =>
        {
            Ok(())
        }
        Err(error) => {
            Err(error).with_context(|| format!("cannot remove {}", paths.state_dir().display()))
        }
    }
}

fn remove_other_pins(directory: &Path, unwanted: impl Fn(&Path) -> bool) -> Result<()> {
    for entry in
        fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?
    {
        let path = entry?.path();
        if unwanted(&path) {
            info!("detaching {}", path.display());
            detach(&path)?;
            remove_pin(&path)?;
        }
    }
    Ok(())
}

/// Ends what a pinned link does before its pin goes: without it, it would go on for a moment after.
fn detach(pin: &Path) -> Result<()> {
    bpf::obj_get(pin)
        .and_then(bpf::link_detach)
        .with_context(|| format!("cannot detach the link {}", pin.display()))
}

fn remove_pin(pin: &Path) -> Result<()> {
    fs::remove_file(pin).with_context(|| format!("cannot remove the pin {}", pin.display()))
}

fn not_there(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL))
}

/// Text for a map, cut at a character's boundary, with at least one zero behind it.
fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut bytes = [0; N];
    let mut end = text.len().min(N - 1);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    bytes[..end].copy_from_slice(&text.as_bytes()[..end]);
    bytes
}

/// Makes a hash map hold exactly what is wanted: adds and changes first, removes last.
fn sync<K, V>(
    map: &mut aya::maps::HashMap<MapData, Wire<K>, Wire<V>>,
    wanted: &BTreeMap<K, V>,
    name: &str,
) -> Result<()>
where
    K: Copy + Ord,
    V: Copy + PartialEq,
    Wire<K>: aya::Pod,
    Wire<V>: aya::Pod,
{
    let present: Vec<Wire<K>> = map
        .keys()
        .collect::<Result<_, _>>()
        .with_context(|| format!("cannot read {name}"))?;
    for (key, value) in wanted {
        map.insert(Wire(*key), Wire(*value), 0)
            .with_context(|| format!("cannot write {name} (is it full?)"))?;
    }
    for key in present {
        if !wanted.contains_key(&key.0) {
            map.remove(&key)
                .with_context(|| format!("cannot remove an entry of {name}"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_cut_at_a_character() {
        let bytes: [u8; 4] = padded("aäöü");
        assert_eq!(text(&bytes), "aä");
        let bytes: [u8; 8] = padded("abc");
        assert_eq!(text(&bytes), "abc");
    }
}
