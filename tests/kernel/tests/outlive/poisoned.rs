//! Pins that are not what they should be.

use std::fs::{self, DirBuilder, File};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::bail;

use aya_obj::generated::bpf_attach_type::{BPF_CGROUP_SOCK_OPS, BPF_SK_LOOKUP};
use aya_obj::generated::bpf_map_type::{BPF_MAP_TYPE_ARRAY, BPF_MAP_TYPE_HASH};
use aya_obj::generated::bpf_prog_type::{BPF_PROG_TYPE_SK_LOOKUP, BPF_PROG_TYPE_SOCK_OPS};
use balancer::sys::bpf;
use testbpf::MapSpec;
use testkit::fixtures::tcp::{self, Listen};
use testkit::fixtures::{Balancer, Cgroup, Machine, Netns, Signal, eventually};

use super::fixture::agree_everywhere;
use super::pins::{Traces, attached, links, only_version, pins};
use super::times;
use super::upgrade::make_another_abi;
use crate::support::{agents, own_port};

const STARTS_WITHIN: Duration = Duration::from_secs(20);

fn a_map() -> OwnedFd {
    let spec = MapSpec {
        max_entries: 7,
        ..MapSpec::new(BPF_MAP_TYPE_HASH, "foreign")
    };
    testbpf::map_create(&spec).expect("a map")
}

fn a_sock_ops() -> OwnedFd {
    testbpf::idle(BPF_PROG_TYPE_SOCK_OPS, BPF_CGROUP_SOCK_OPS, "foreign")
}

fn a_sk_lookup() -> OwnedFd {
    testbpf::idle(BPF_PROG_TYPE_SK_LOOKUP, BPF_SK_LOOKUP, "foreign")
}

/// Where the pins of the one data plane are.
fn directory(state: &Path) -> PathBuf {
    state.join(only_version(state))
}

/// The pinned link whose name has this in it.
fn link(state: &Path, kind: &str) -> PathBuf {
    let mut found = links(state)
        .into_keys()
        .filter(|path| path.to_string_lossy().contains(kind));
    state.join(found.next().unwrap_or_else(|| panic!("no link of {kind}")))
}

/// Pins an object in the place of another.
fn replace(path: &Path, object: &OwnedFd) {
    fs::remove_file(path).expect("a pin can be removed");
    bpf::obj_pin(object, path).expect("an object can be pinned");
}

fn make(path: &Path) {
    DirBuilder::new()
        .create(path)
        .expect("bpffs makes directories");
}

/// Shows that with a data plane poisoned by `poison` (which returns the pin at fault) `run` either
/// fails, says which pin it is and what to do, and changes nothing, or gets ready and works; and
/// that `unload` clears it all, and `run` works then.
#[track_caller]
fn poisoned<T>(poison: impl FnOnce(&Path) -> (PathBuf, T) + Send) {
    poisoned_each([poison]);
}

/// Checks each poisoned pin as [`poisoned`] does, one after the other.
#[track_caller]
fn poisoned_each<T, P>(poisons: impl IntoIterator<Item = P> + Send)
where
    P: FnOnce(&Path) -> (PathBuf, T) + Send,
{
    Machine::with(|machine| {
        let yaml = own_port("least-connections", &["quota: {per_backend: 3}"]);
        let mut balancer = Balancer::start(machine, &yaml);
        let mut traces = Traces::default();
        for poison in poisons {
            traces.note(balancer.state());
            balancer.stop(Signal::SIGTERM);
            let (pin, _guards) = poison(balancer.state());
            start_poisoned(machine, &mut balancer, &pin, &mut traces);
            balancer.must(&["unload"]);
            let left = pins(balancer.state());
            assert!(!balancer.state().exists(), "left: {left:?}");
            balancer.launch();
            assert_works(machine, &balancer);
        }
        traces.note(balancer.state());
        balancer.must(&["unload"]);
        assert!(balancer.wait().success());
        traces.assert_gone(machine, &balancer);
    });
}

/// A start that can't take another build's data plane over leaves that one as it is.
#[test]
fn a_foreign_pin_in_the_data_plane_of_another_build() {
    Machine::with(|machine| {
        let yaml = own_port("least-connections", &["quota: {per_backend: 3}"]);
        let mut balancer = Balancer::start(machine, &yaml);
        let _listener = Listen::on(&agents()).open();
        balancer.wait_active(1);
        balancer.stop(Signal::SIGTERM);
        make_another_abi(balancer.state());
        // As if it guarded one netns more, by a link that is none.
        let pin = balancer.state().join("v999/link_steer_77");
        bpf::obj_pin(a_map(), &pin).expect("an object can be pinned");
        let before = attached(machine);
        balancer.spawn();
        assert_eq!(balancer.wait().code(), Some(1));
        let logs = balancer.logs();
        let named = pin.to_str().expect("UTF-8");
        assert!(
            logs.contains(named) && logs.contains("balancer unload"),
            "{logs}"
        );
        let steered = tcp::connect_many(agents(), 5);
        assert_eq!(steered.len(), 3, "it is in force still: {logs}");
        assert!(attached(machine).1 >= before.1, "{logs}");
        drop(steered);
        fs::remove_file(&pin).expect("a pin can be removed");
        balancer.launch();
        assert!(!balancer.state().join("v999").exists());
        assert_eq!(attached(machine), (1, 1));
        balancer.must(&["unload"]);
        assert!(balancer.wait().success());
    });
}

/// A daemon on a poisoned data plane; it has ended when this returns.
#[track_caller]
fn start_poisoned(machine: &Machine, balancer: &mut Balancer, pin: &Path, traces: &mut Traces) {
    let pin = pin.display();
    let before = pins(balancer.state());
    let Some(complaint) = refused_to_run(balancer) else {
        println!("handled: {pin}");
        traces.note(balancer.state());
        assert_works(machine, balancer);
        balancer.stop(Signal::SIGTERM);
        return;
    };
    println!("{complaint}");
    assert!(
        complaint.contains(&pin.to_string()),
        "{pin} is not named: {complaint}"
    );
    assert!(
        complaint.contains("balancer unload"),
        "what to do? {complaint}"
    );
    assert_eq!(
        pins(balancer.state()),
        before,
        "it changes nothing: {complaint}"
    );
}

/// What `run` complained about; `None`: it is ready.
#[track_caller]
fn refused_to_run(balancer: &mut Balancer) -> Option<String> {
    balancer.spawn();
    let ended = eventually(STARTS_WITHIN, || match balancer.ended() {
        None if !balancer.is_ready() => bail!("neither ready nor at its end:\n{}", balancer.logs()),
        ended => Ok(ended.is_some()),
    });
    if !ended {
        return None;
    }
    let (status, complaint) = (balancer.wait(), balancer.logs());
    assert_eq!(status.code(), Some(1), "{complaint}");
    Some(complaint)
}

#[track_caller]
fn assert_works(machine: &Machine, balancer: &Balancer) {
    assert_eq!(attached(machine), (1, 1), "{}", balancer.logs());
    let mut listeners = vec![Listen::on(&agents()).open()];
    let clients = tcp::connect_many(agents(), 8);
    assert_eq!(clients.len(), 3, "{}", balancer.logs());
    assert_eq!(agree_everywhere(balancer, &mut listeners), [3]);
    drop(clients);
    assert_eq!(agree_everywhere(balancer, &mut listeners), [0]);
}

#[test]
fn a_map_of_another_shape() {
    let names = ["COUNTS", "LISTENERS", "SERVICES", "CONNECTION"];
    poisoned_each(names.into_iter().take(times(4, 2)).map(|name| {
        move |state: &Path| {
            let pin = directory(state).join(name);
            replace(&pin, &a_map());
            (pin, ())
        }
    }));
}

/// Only the number of entries differs.
#[test]
fn a_map_of_nearly_the_same_shape() {
    poisoned(|state| {
        let pin = directory(state).join("SERVICE_INFO");
        let info = bpf::map_info(bpf::obj_get(&pin).expect("it is pinned")).expect("it is a map");
        let spec = MapSpec {
            key_size: info.key_size,
            value_size: info.value_size,
            max_entries: info.max_entries / 2,
            flags: info.flags,
            ..MapSpec::new(BPF_MAP_TYPE_ARRAY, "SERVICE_INFO")
        };
        replace(&pin, &testbpf::map_create(&spec).expect("a map"));
        (pin, ())
    });
}

/// Takes the pin away.
fn remove(pin: PathBuf) -> (PathBuf, ()) {
    fs::remove_file(&pin).expect("a pin can be removed");
    (pin, ())
}

#[test]
fn a_missing_map() {
    let names = ["EXEMPT", "CONNECTION", "HEARTBEAT"];
    let removed = |name| move |state: &Path| remove(directory(state).join(name));
    poisoned_each(names.into_iter().take(times(3, 1)).map(removed));
}

#[test]
fn a_program_where_a_map_should_be() {
    poisoned(|state| {
        let pin = directory(state).join("POLICY");
        replace(&pin, &a_sock_ops());
        (pin, ())
    });
}

#[test]
fn a_directory_where_a_map_should_be() {
    poisoned(|state| {
        let pin = directory(state).join("POLICY");
        make(&remove(pin.clone()).0);
        (pin, ())
    });
}

fn map_in_place_of(kind: &'static str) {
    poisoned(move |state| {
        let pin = link(state, kind);
        replace(&pin, &a_map());
        (pin, ())
    });
}

#[test]
fn a_map_where_the_link_of_the_cgroup_should_be() {
    map_in_place_of("account");
}

#[test]
fn a_map_where_the_link_of_the_namespace_should_be() {
    map_in_place_of("steer");
}

#[test]
fn a_missing_link_is_made_again() {
    poisoned_each(["account", "steer"].map(|kind| move |state: &Path| remove(link(state, kind))));
}

#[track_caller]
fn link_to_a_namespace_in_place_of(kind: &'static str) {
    poisoned(|state| {
        let pin = link(state, kind);
        let netns = Netns::new();
        let target = File::open(netns.path()).expect("the netns is there");
        let foreign = bpf::link_create(a_sk_lookup(), &target, BPF_SK_LOOKUP).expect("a link");
        replace(&pin, &foreign);
        (pin, netns)
    });
}

#[test]
fn a_link_of_another_kind_where_that_of_the_cgroup_should_be() {
    link_to_a_namespace_in_place_of("account");
}

/// To put our program under it would count the sockets of somebody else.
#[test]
fn a_link_to_another_cgroup_where_ours_should_be() {
    poisoned(|state| {
        let pin = link(state, "account");
        let cgroup = Cgroup::new();
        let target = File::open(cgroup.path()).expect("the cgroup is there");
        let foreign = bpf::link_create(a_sock_ops(), &target, BPF_CGROUP_SOCK_OPS).expect("a link");
        replace(&pin, &foreign);
        (pin, cgroup)
    });
}

#[test]
fn a_link_to_another_namespace_where_ours_should_be() {
    link_to_a_namespace_in_place_of("steer");
}

/// What another program has left where a new data plane is built.
#[test]
fn junk_where_a_data_plane_is_built() {
    poisoned(|state| {
        let staging = state.join(format!("{}-new", only_version(state)));
        make(&staging);
        make(&staging.join("below"));
        make(&staging.join("below").join("further"));
        bpf::obj_pin(a_map(), &staging.join("below").join("COUNTS")).expect("a pin");
        bpf::obj_pin(a_map(), &staging.join("COUNTS")).expect("a pin");
        bpf::obj_pin(a_sock_ops(), &staging.join("link_account_1")).expect("a pin");
        bpf::obj_pin(a_map(), &staging.join("foreign")).expect("a pin");
        (staging, ())
    });
}

fn foreign_map_named(name: &'static str) {
    poisoned(move |state| {
        let pin = directory(state).join(name);
        bpf::obj_pin(a_map(), &pin).expect("a pin");
        (pin, ())
    });
}

#[test]
fn a_pin_of_unknown_name() {
    foreign_map_named("FOREIGN");
}

#[test]
fn a_pin_of_unknown_name_that_begins_like_one_of_ours() {
    foreign_map_named("link_steer_77");
}
