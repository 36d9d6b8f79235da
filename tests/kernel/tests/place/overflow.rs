//! More than the maps hold: what does not fit is named and left as it is, and all else is placed.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::ensure;
use balancer::dataplane::Placing;
use balancer::dataplane::endpoints::{Assigned, Known};
use balancer::place::{EndpointPlan, GroupPlan, PlacePlan};
use balancer_common::abi::{
    EndpointGroup, MAX_ENDPOINT_GROUPS, MAX_ENDPOINTS, MAX_FRONTENDS, MAX_MEMBERS, Published,
};
use testkit::fixtures::tcp::{self, Listen, Listener};
use testkit::fixtures::{Machine, eventually};

use super::node::{FIRST_PORT, Node, loads, open_servers};

/// How long the place of what has gone stays taken, and some time to spare.
const FREED_WITHIN: Duration = Duration::from_secs(10);

/// Puts a plan in force, as the daemon does; what there was no room for, in words.
fn put_in_force(node: &mut Node<'_>, groups: &[GroupPlan]) -> (Vec<Assigned>, Vec<String>) {
    let plan = PlacePlan {
        groups: groups.to_vec(),
        ..PlacePlan::default()
    };
    let writer = node.writer();
    let tables = &mut writer.tables.place;
    let assigned = writer.endpoints.assign(tables, &plan).expect("assigned");
    let known = groups.iter().map(|group| Known {
        group: EndpointGroup {
            known_until_ns: u64::MAX,
            ..EndpointGroup::default()
        },
        published: vec![Published::default(); group.endpoints.len()],
    });
    let known: Vec<Known> = known.collect();
    let done = writer
        .endpoints
        .put_in_force(tables, &plan, &assigned, &known);
    done.expect("in force");
    (assigned, writer.endpoints.left_out().to_vec())
}

/// Addresses from the first one on.
fn addresses(first: Ipv4Addr, number: usize) -> impl Iterator<Item = Ipv4Addr> {
    let first = u32::from(first);
    let numbers = 0..u32::try_from(number).expect("few");
    numbers.map(move |n| Ipv4Addr::from(first + n))
}

/// A group of so many endpoints, of which only the first one serves.
fn group(number: u8, endpoints: usize) -> GroupPlan {
    let others = addresses(Ipv4Addr::new(10, 100 + number, 0, 0), endpoints - 1);
    let others = others.map(|address| (address, 0));
    let all = [(Ipv4Addr::LOCALHOST, 1)].into_iter().chain(others);
    let endpoint = |(address, weight)| EndpointPlan {
        name: format!("{address} of {number}"),
        v4: Some(address),
        v6: None,
        port: FIRST_PORT,
        node: None,
        weight,
        published: None,
    };
    GroupPlan {
        name: format!("group-{number}"),
        frontends: vec![frontend(number)],
        own_addresses: Vec::new(),
        endpoints: all.map(endpoint).collect(),
        rank: (0, 1),
        heard: None,
    }
}

/// Where clients of a group connect to.
fn frontend(number: u8) -> SocketAddr {
    (Ipv4Addr::new(127, 0, 50, number), 11_800).into()
}

/// Whether a connect there goes to the endpoint, or to who listens there itself.
fn is_placed(servers: &mut [[Listener; 2]], to: SocketAddr) -> bool {
    let before: usize = loads(servers).iter().sum();
    let client = tcp::connect(to).connected();
    let after: usize = loads(servers).iter().sum();
    drop(client);
    after > before
}

fn node(machine: &Machine) -> (Node<'_>, Vec<[Listener; 2]>) {
    let mut node = Node::counting(machine);
    assert_eq!(node.set_placing(true), Placing::On);
    (node, open_servers(1))
}

#[test]
fn a_group_too_many_is_left_as_it_is_until_another_one_goes() {
    Machine::with(|machine| {
        let (mut node, mut servers) = node(machine);
        let last = u8::try_from(MAX_ENDPOINT_GROUPS).expect("few");
        let mut groups: Vec<GroupPlan> = (0..=last).map(|number| group(number, 1)).collect();
        let _beside = Listen::on(&frontend(last)).open();
        let (_, left_out) = put_in_force(&mut node, &groups);
        let [said] = &left_out[..] else {
            panic!("{left_out:?}");
        };
        let words = format!("no room for the endpoint group `group-{last}`");
        assert!(said.contains(&words), "{said}");
        assert!(is_placed(&mut servers, frontend(0)));
        assert!(is_placed(&mut servers, frontend(last - 1)));
        assert!(!is_placed(&mut servers, frontend(last)));
        groups.remove(0);
        eventually(FREED_WITHIN, || {
            let (_, left_out) = put_in_force(&mut node, &groups);
            ensure!(left_out.is_empty(), "{left_out:?}");
            Ok(())
        });
        assert!(is_placed(&mut servers, frontend(last)));
    });
}

#[test]
fn endpoints_too_many_are_named_and_the_others_take_the_connections() {
    Machine::with(|machine| {
        let (mut node, mut servers) = node(machine);
        let full = MAX_ENDPOINTS / MAX_MEMBERS;
        let full = u8::try_from(full).expect("few");
        let mut groups: Vec<GroupPlan> = (0..full).map(|n| group(n, MAX_MEMBERS)).collect();
        groups[0] = group(0, MAX_MEMBERS + 44);
        groups.push(group(full, 3));
        let _beside = Listen::on(&frontend(full)).open();
        let (assigned, left_out) = put_in_force(&mut node, &groups);
        let [of_group, of_node] = &left_out[..] else {
            panic!("{left_out:?}");
        };
        let words = "no room for 44 endpoints of `group-0`";
        assert!(of_group.contains(words), "{of_group}");
        let words = format!("no room for 3 endpoints of `group-{full}`");
        assert!(of_node.contains(&words), "{of_node}");
        let placed = assigned[0].endpoints.iter().flatten().count();
        assert_eq!(placed, MAX_MEMBERS);
        assert!(is_placed(&mut servers, frontend(0)));
        assert!(is_placed(&mut servers, frontend(full - 1)));
        assert!(!is_placed(&mut servers, frontend(full)));
        let index = assigned[usize::from(full)].group.expect("it has an index");
        assert_eq!(node.reasons(index), [("no-endpoint", 1)].into());
        // What goes leaves room.
        groups.remove(1);
        eventually(FREED_WITHIN, || {
            let (_, left_out) = put_in_force(&mut node, &groups);
            ensure!(left_out.len() == 1, "{left_out:?}");
            Ok(())
        });
        assert!(is_placed(&mut servers, frontend(full)));
    });
}

#[test]
fn frontends_too_many_are_left_as_they_are() {
    Machine::with(|machine| {
        let (mut node, mut servers) = node(machine);
        let mut many = group(0, 1);
        let first = Ipv4Addr::new(127, 1, 0, 0);
        many.frontends = addresses(first, MAX_FRONTENDS + 2)
            .map(|address| (address, 11_800).into())
            .collect();
        let (fits, beyond) = (many.frontends[0], many.frontends[MAX_FRONTENDS]);
        let _beside = [beyond, frontend(1)].map(|at| Listen::on(&at).open());
        let groups = [many, group(1, 1)];
        let (_, left_out) = put_in_force(&mut node, &groups);
        let [of_many, of_other] = &left_out[..] else {
            panic!("{left_out:?}");
        };
        assert!(
            of_many.contains("no room for 2 frontends of `group-0`"),
            "{of_many}"
        );
        assert!(
            of_other.contains("no room for 1 frontends of `group-1`"),
            "{of_other}"
        );
        assert!(is_placed(&mut servers, fits));
        assert!(!is_placed(&mut servers, beyond));
        assert!(!is_placed(&mut servers, frontend(1)));
        // With fewer of them the other group gets its own.
        let few = GroupPlan {
            frontends: vec![fits],
            ..groups[0].clone()
        };
        let (_, left_out) = put_in_force(&mut node, &[few, groups[1].clone()]);
        assert_eq!(left_out, [""; 0]);
        assert!(is_placed(&mut servers, frontend(1)));
    });
}
