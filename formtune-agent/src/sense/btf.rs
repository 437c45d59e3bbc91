//! Offsets of kernel structure members, from the kernel's own BTF.
//!
//! rustc emits no CO-RE relocations and aya does not show a structure's members, so this
//! walks the type section itself. Format: Documentation/bpf/btf.rst. Only what the probes
//! ask for is decoded: members, also inside anonymous structures and unions, array
//! element sizes and enumerators.

use std::collections::HashMap;
use std::path::Path;

/// Where the kernel shows its types (`CONFIG_DEBUG_INFO_BTF`).
pub const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

const MAGIC: u16 = 0xeb9f;
/// The names of the integer that is as long as a pointer, before and after clang.
const LONG: [&str; 2] = ["long unsigned int", "unsigned long"];
/// Members looked at for one name; the largest structure has some hundred. Types that are
/// damaged can hold themselves, over and over.
const MEMBERS: u32 = 1 << 14;
const KIND_INT: u32 = 1;
const KIND_PTR: u32 = 2;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_TYPEDEF: u32 = 8;
const KIND_VOLATILE: u32 = 9;
const KIND_CONST: u32 = 10;
const KIND_RESTRICT: u32 = 11;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_DECL_TAG: u32 = 17;
const KIND_TYPE_TAG: u32 = 18;
const KIND_ENUM64: u32 = 19;

/// Why a field could not be found.
#[derive(Debug, thiserror::Error)]
pub enum BtfError {
    /// The file is not there or not readable.
    #[error("failed to read {path}: {source}")]
    Read {
        /// Usually [`VMLINUX`].
        path: String,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// Not BTF, or of a kind that came after this code.
    #[error("BTF is malformed: {0}")]
    Malformed(&'static str),
    /// The kernel was built without it, or it changed its name.
    #[error("this kernel's BTF has no {0}")]
    Missing(String),
}

/// The types of a kernel.
pub struct Btf {
    data: Vec<u8>,
    /// Where the string section begins.
    strings: usize,
    /// Where each type's record begins; index 0 is `void`.
    types: Vec<u32>,
    structs: HashMap<String, u32>,
    enumerators: HashMap<String, u32>,
}

impl Btf {
    /// Reads and indexes `path`.
    ///
    /// # Errors
    /// [`BtfError::Read`], [`BtfError::Malformed`].
    pub fn read(path: &Path) -> Result<Self, BtfError> {
        let data = std::fs::read(path)
            .map_err(|source| BtfError::Read { path: path.display().to_string(), source })?;
        Self::parse(data)
    }

    /// Indexes BTF in memory: little-endian structures by name and `*_cgrp_id` enumerators.
    ///
    /// # Errors
    /// [`BtfError::Malformed`].
    pub fn parse(data: Vec<u8>) -> Result<Self, BtfError> {
        const SHORT: BtfError = BtfError::Malformed("it ends in the middle of a record");
        if data.len() >= 2 && u16::from_be_bytes([data[0], data[1]]) == MAGIC {
            return Err(BtfError::Malformed("it is of a machine with the other byte order"));
        }
        if data.len() < 24 || u16::from_le_bytes([data[0], data[1]]) != MAGIC {
            return Err(BtfError::Malformed("no magic number at its start"));
        }
        let header = |at| read_u32(&data, at).ok_or(SHORT).map(|v| v as usize);
        let start = header(4)?;
        let types_at = start + header(8)?;
        let types_end = types_at + header(12)?;
        let strings = start + header(16)?;
        if types_end > data.len() || strings > data.len() {
            return Err(SHORT);
        }
        let mut btf = Self {
            data,
            strings,
            types: vec![0],
            structs: HashMap::new(),
            enumerators: HashMap::new(),
        };
        let mut at = types_at;
        while at < types_end {
            let id = btf.types.len() as u32;
            let info = btf.u32(at + 4).ok_or(SHORT)?;
            let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
            match kind {
                KIND_INT => {
                    let (name, size) = (btf.name(at).ok_or(SHORT)?, btf.u32(at + 8).ok_or(SHORT)?);
                    if LONG.contains(&name) && size as usize != size_of::<usize>() {
                        let why = "it is of a machine with pointers of another size";
                        return Err(BtfError::Malformed(why));
                    }
                }
                KIND_STRUCT => {
                    let name = btf.name(at).ok_or(SHORT)?;
                    if !name.is_empty() && count > 0 {
                        let name = name.to_owned();
                        btf.structs.entry(name).or_insert(id);
                    }
                }
                KIND_ENUM => {
                    for i in 0..count {
                        let name = btf.name(at + 12 + i * 8).ok_or(SHORT)?;
                        if name.ends_with("_cgrp_id") {
                            let name = name.to_owned();
                            let value = btf.u32(at + 16 + i * 8).ok_or(SHORT)?;
                            btf.enumerators.insert(name, value);
                        }
                    }
                }
                _ => {}
            }
            btf.types.push(at as u32);
            at += 12
                + match kind {
                    KIND_INT | KIND_VAR | KIND_DECL_TAG => 4,
                    KIND_ARRAY => 12,
                    KIND_STRUCT | KIND_UNION | KIND_DATASEC | KIND_ENUM64 => 12 * count,
                    KIND_ENUM | KIND_FUNC_PROTO => 8 * count,
                    0..=KIND_ENUM64 => 0,
                    _ => return Err(BtfError::Malformed("a kind of type that is not known")),
                };
        }
        Ok(btf)
    }

    /// Byte offset of a member of a structure, e.g. `("task_struct", "se.cfs_rq")`; each
    /// step of the path may lie in anonymous structures or unions.
    ///
    /// # Errors
    /// [`BtfError::Missing`] naming structure and member.
    pub fn offset(&self, structure: &str, path: &str) -> Result<u32, BtfError> {
        let missing = || BtfError::Missing(format!("struct {structure} with a member {path}"));
        let mut ty = *self.structs.get(structure).ok_or_else(missing)?;
        let mut offset = 0;
        for step in path.split('.') {
            let (bits, member) = self.member(ty, step, 0, &mut { MEMBERS }).ok_or_else(missing)?;
            if bits % 8 != 0 {
                return Err(missing());
            }
            offset = (bits / 8).checked_add(offset).ok_or_else(missing)?;
            ty = member;
        }
        Ok(offset)
    }

    /// Arguments of a tracepoint, e.g. `tcp_retransmit_skb`: those of the function type
    /// `btf_trace_…` behind the first, which is the kernel's own (include/linux/tracepoint.h).
    ///
    /// # Errors
    /// [`BtfError::Missing`].
    pub fn tracepoint_arguments(&self, name: &str) -> Result<u32, BtfError> {
        let wanted = format!("btf_trace_{name}");
        let missing = || BtfError::Missing(format!("tracepoint {name}"));
        let of_type = |at: usize| self.u32(at + 4).map(|info| (info >> 24 & 0x1f, info & 0xffff));
        let typedef = self.types.iter().skip(1).map(|at| *at as usize).find(|&at| {
            of_type(at).is_some_and(|(kind, _)| kind == KIND_TYPEDEF)
                && self.name(at) == Some(&wanted)
        });
        let at = typedef.and_then(|at| self.resolve(self.u32(at + 8)?));
        // A pointer to the function's type.
        let at = at.filter(|at| of_type(*at).is_some_and(|(kind, _)| kind == KIND_PTR));
        let at = at.and_then(|at| self.resolve(self.u32(at + 8)?)).ok_or_else(missing)?;
        match of_type(at) {
            Some((KIND_FUNC_PROTO, arguments)) => arguments.checked_sub(1).ok_or_else(missing),
            _ => Err(missing()),
        }
    }

    /// Value of an enumerator whose name ends in `_cgrp_id`, e.g. `cpu_cgrp_id`: the index
    /// of a cgroup controller in `css_set.subsys`.
    ///
    /// # Errors
    /// [`BtfError::Missing`].
    pub fn cgroup_subsys_id(&self, name: &str) -> Result<u32, BtfError> {
        let value = self.enumerators.get(name).copied();
        value.ok_or_else(|| BtfError::Missing(format!("enumerator {name}")))
    }

    /// Value of an enumerator with this name; looked for anew each time.
    pub fn enumerator(&self, name: &str) -> Option<u32> {
        let enums = self.types.iter().skip(1).map(|&at| at as usize);
        enums.filter(|&at| self.kind(at) == Some(KIND_ENUM)).find_map(|at| {
            let count = (self.u32(at + 4)? & 0xffff) as usize;
            let entry = (0..count).map(|i| at + 12 + i * 8).find(|&e| self.name(e) == Some(name));
            self.u32(entry? + 4)
        })
    }

    fn kind(&self, at: usize) -> Option<u32> {
        Some(self.u32(at + 4)? >> 24 & 0x1f)
    }

    /// Bit offset and type of a member, searched also in anonymous members.
    fn member(&self, ty: u32, name: &str, depth: u8, left: &mut u32) -> Option<(u32, u32)> {
        let at = self.resolve(ty)?;
        let info = self.u32(at + 4)?;
        if !matches!(info >> 24 & 0x1f, KIND_STRUCT | KIND_UNION) || depth > 8 {
            return None;
        }
        (0..(info & 0xffff) as usize).find_map(|i| {
            *left = left.checked_sub(1)?;
            let member = at + 12 + i * 12;
            let (member_type, raw) = (self.u32(member + 4)?, self.u32(member + 8)?);
            // With the kind flag the upper byte is a bit field's width.
            let bits = if info >> 31 == 1 { raw & 0x00ff_ffff } else { raw };
            match self.name(member)? {
                found if found == name => Some((bits, member_type)),
                "" => {
                    let (inner, ty) = self.member(member_type, name, depth + 1, left)?;
                    Some((bits.checked_add(inner)?, ty))
                }
                _ => None,
            }
        })
    }

    /// Where the record of a type begins, behind typedefs and qualifiers.
    fn resolve(&self, mut ty: u32) -> Option<usize> {
        for _ in 0..32 {
            let at = *self.types.get(ty as usize).filter(|_| ty != 0)? as usize;
            match self.u32(at + 4)? >> 24 & 0x1f {
                KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_RESTRICT | KIND_TYPE_TAG => {
                    ty = self.u32(at + 8)?;
                }
                _ => return Some(at),
            }
        }
        None
    }

    /// The name whose string offset is stored at `at`.
    fn name(&self, at: usize) -> Option<&str> {
        let start = self.strings + self.u32(at)? as usize;
        let rest = self.data.get(start..)?;
        let end = rest.iter().position(|&byte| byte == 0)?;
        std::str::from_utf8(&rest[..end]).ok()
    }

    fn u32(&self, at: usize) -> Option<u32> {
        read_u32(&self.data, at)
    }
}

fn read_u32(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(data.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// `struct outer { int a; struct { union { int b; int c; }; const struct inner d; }; }`,
    /// `struct inner { int x; int y; }`, `enum { cpu_cgrp_id = 3 }`,
    /// `typedef void (*btf_trace_event)(void *, struct inner *, int)` or the like.
    fn sample() -> Vec<u8> {
        let mut strings = vec![0u8];
        let mut string = |name: &str| {
            let at = strings.len() as u32;
            strings.extend(name.bytes().chain([0]));
            at
        };
        let mut types: Vec<u32> = Vec::new();
        types.extend([string("int"), KIND_INT << 24, 4, 32]); // 1
        let (x, y) = (string("x"), string("y"));
        types.extend([string("inner"), KIND_STRUCT << 24 | 2, 8, x, 1, 0, y, 1, 32]); // 2
        types.extend([0, KIND_CONST << 24, 2]); // 3
        let (b, c) = (string("b"), string("c"));
        types.extend([0, KIND_UNION << 24 | 2, 4, b, 1, 0, c, 1, 0]); // 4
        types.extend([0, KIND_STRUCT << 24 | 2, 12, 0, 4, 0, string("d"), 3, 32]); // 5
        types.extend([string("outer"), KIND_STRUCT << 24 | 2, 16, string("a"), 1, 0, 0, 5, 32]);
        types.extend([0, KIND_ENUM << 24 | 1, 4, string("cpu_cgrp_id"), 3]); // 7
        types.extend([0, KIND_FUNC_PROTO << 24 | 3, 0, 0, 9, 0, 2, 0, 1]); // 8
        types.extend([0, KIND_PTR << 24, 8]); // 9
        types.extend([string("btf_trace_event"), KIND_TYPEDEF << 24, 9]); // 10
        types.extend([string("btf_trace_odd"), KIND_TYPEDEF << 24, 2]); // 11
        let types: Vec<u8> = types.iter().flat_map(|v| v.to_le_bytes()).collect();
        let mut data = vec![0x9f, 0xeb, 1, 0];
        for v in [24, 0, types.len(), types.len(), strings.len()] {
            data.extend((v as u32).to_le_bytes());
        }
        data.extend(types);
        data.extend(strings);
        data
    }

    #[test]
    fn members_are_found_in_anonymous_members_and_behind_qualifiers() {
        let btf = Btf::parse(sample()).unwrap();
        assert_eq!(btf.offset("outer", "a").unwrap(), 0);
        assert_eq!(btf.offset("outer", "c").unwrap(), 4);
        assert_eq!(btf.offset("outer", "d").unwrap(), 8);
        assert_eq!(btf.offset("outer", "d.y").unwrap(), 12);
        assert_eq!(btf.cgroup_subsys_id("cpu_cgrp_id").unwrap(), 3);
    }

    #[test]
    fn enumerators_and_arguments_are_found_by_name() {
        let btf = Btf::parse(sample()).unwrap();
        assert_eq!(btf.enumerator("cpu_cgrp_id"), Some(3));
        assert_eq!(btf.enumerator("__RQF_FLUSH_SEQ"), None);
        assert_eq!(btf.tracepoint_arguments("event").ok(), Some(2));
        assert_eq!(btf.tracepoint_arguments("odd").ok(), None);
        assert_eq!(btf.tracepoint_arguments("other").ok(), None);
    }

    #[test]
    fn what_is_missing_is_named() {
        let btf = Btf::parse(sample()).unwrap();
        assert_eq!(
            btf.offset("outer", "d.z").unwrap_err().to_string(),
            "this kernel's BTF has no struct outer with a member d.z"
        );
        assert_eq!(
            btf.cgroup_subsys_id("io_cgrp_id").unwrap_err().to_string(),
            "this kernel's BTF has no enumerator io_cgrp_id"
        );
        assert!(matches!(Btf::parse(vec![0; 64]), Err(BtfError::Malformed(_))));
    }

    #[test]
    fn btf_that_is_cut_short_anywhere_is_an_error_of_one_line_or_read_as_far_as_it_goes() {
        let whole = sample();
        for length in 0..whole.len() {
            match Btf::parse(whole[..length].to_vec()) {
                // The last names are cut off.
                Ok(btf) => drop(btf.offset("outer", "d.y")),
                Err(error) => assert_eq!(error.to_string().lines().count(), 1, "{error}"),
            }
        }
    }

    #[test]
    fn btf_of_another_architecture_is_refused() {
        let refused = |data: Vec<u8>| Btf::parse(data).err().unwrap().to_string();
        let swapped: Vec<u8> = sample()
            .chunks(2)
            .flat_map(|pair| pair.iter().rev().copied().collect::<Vec<_>>())
            .collect();
        assert_eq!(
            refused(swapped),
            "BTF is malformed: it is of a machine with the other byte order"
        );
        let long = |name: &str, size: u32| {
            let mut strings = vec![0u8];
            strings.extend(name.bytes().chain([0]));
            let types = [1, KIND_INT << 24, size, size * 8];
            let mut data = vec![0x9f, 0xeb, 1, 0];
            for v in [24, 0, 16, 16, strings.len() as u32].into_iter().chain(types) {
                data.extend(v.to_le_bytes());
            }
            data.extend(strings);
            data
        };
        for name in LONG {
            assert_eq!(
                refused(long(name, 4)),
                "BTF is malformed: it is of a machine with pointers of another size"
            );
            assert!(Btf::parse(long(name, 8)).is_ok());
        }
        assert!(Btf::parse(long("int", 4)).is_ok());
    }

    #[test]
    fn counts_and_offsets_beyond_the_file_are_refused() {
        // The header's length, and where types and strings lie.
        for at in [4, 8, 12, 16] {
            let mut data = sample();
            data[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
            assert!(matches!(Btf::parse(data), Err(BtfError::Malformed(_))), "{at}");
        }
    }

    #[test]
    fn a_structure_that_holds_itself_ends() {
        // `struct { struct ...; 65,535 times }` at type 1, named `a`.
        let mut data = vec![0x9f, 0xeb, 1, 0];
        let types = 12 + 12 * 0xffff_u32;
        for v in [24, 0, types, types, 3, 1, KIND_STRUCT << 24 | 0xffff, 8] {
            data.extend(v.to_le_bytes());
        }
        data.extend((0..0xffff).flat_map(|_| [0u32, 1, !7u32]).flat_map(u32::to_le_bytes));
        data.extend(b"\0a\0");
        let btf = Btf::parse(data).unwrap();
        assert!(matches!(btf.offset("a", "b"), Err(BtfError::Missing(_))));
    }

    proptest! {
        /// Whatever the bytes, an answer or an error, never a panic.
        #[test]
        fn damaged_btf_is_refused_or_read(
            flips in proptest::collection::vec((0usize..400, any::<u8>()), 0..8),
            cut in 0usize..400,
        ) {
            let mut data = sample();
            for (at, value) in flips {
                let at = at % data.len();
                data[at] = value;
            }
            data.truncate(cut.max(1));
            if let Ok(btf) = Btf::parse(data) {
                let _ = btf.offset("outer", "d.y");
                let _ = btf.cgroup_subsys_id("cpu_cgrp_id");
                let _ = btf.enumerator("cpu_cgrp_id");
                let _ = btf.tracepoint_arguments("event");
            }
        }
    }
}
