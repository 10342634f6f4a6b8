/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What user space knows by name, and the number that tells it whether numbers in maps mean the same to another version. */
#pragma once

#include "maps.h"

/*
 * To be raised where something in a map gets another meaning and neither its type nor a name above tells. Maps of another
 * schema are not handed on from program to program.
 */
enum schema {
	SCHEMA = 1,
};

/* Never read: it puts the enums, which user space knows by name, into the object's BTF. */
struct names {
	enum reason reason;
	enum mode mode;
	enum service_option service_option;
	enum member_flag member_flag;
	enum nat_state nat_state;
	enum stage stage;
	enum stages_in_use stages_in_use;
	enum schema schema;
};

const volatile struct names names = {};
